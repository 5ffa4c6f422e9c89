"""What the operators share: dispatch, argument checks, workspace, random bits."""
