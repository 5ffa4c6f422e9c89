"""What differs between the systems when they are trained, one `Task` each."""
