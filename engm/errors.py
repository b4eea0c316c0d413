"""The two errors that a user of the kit meets on purpose."""


class InputError(ValueError):
    """A value, file or folder from outside is wrong; the message says what to do instead.

    The command line prints the message alone. Anything else that escapes is a fault of the kit
    and keeps its traceback.
    """


class NonFiniteLossError(FloatingPointError):
    """A loss is inf or nan; the step that would have followed was not taken.

    Attributes:
        steps_ago: How many steps, the failed one among them, were asked for and not taken before
            this was known: 0 on the CPU, some on a GPU, which the host does not wait for.
    """

    steps_ago = 0
