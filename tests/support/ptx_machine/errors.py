"""What the machine raises: text it does not know, and programs that no GPU could run."""


class UnknownForm(Exception):
    """A mnemonic, modifier, operand or directive that the machine does not implement."""


class ProgramError(Exception):
    """The program did what has no meaning: a stray access, a deadlock, an unwritten register."""


class HazardError(Exception):
    """Observers of an execution found hazards; the text lists them."""
