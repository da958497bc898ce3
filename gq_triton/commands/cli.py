"""The program ``gq-triton COMMAND``, which imports a command when it is called."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

__all__ = ["main"]

COMMANDS = {
    "study": ("gq_triton.study.command", "run scaling studies and report what they found"),
    "noise": ("gq_triton.variance.noise.command", "measure how noisy a model's gradients are"),
    "variance": (
        "gq_triton.variance.trajectory.command",
        "log the variance of gradient estimators along a training",
    ),
    "plan": ("gq_triton.plan.command", "predict memory and time on 1 to 16 384 GPUs"),
    "bench": ("gq_triton.bench.command", "check the results, then measure the speed"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes the process's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"gq_triton {version('gq_triton')}\n")
        return 0
    if arguments[0] not in COMMANDS:
        listed = ", ".join(COMMANDS)
        sys.stderr.write(f"gq-triton: no command {arguments[0]!r}; there are {listed}\n")
        return 2
    module, _ = COMMANDS[arguments[0]]
    try:
        return import_module(module).main(arguments[1:])
    except KeyboardInterrupt:
        sys.stderr.write(f"gq-triton {arguments[0]}: interrupted\n")
        return 130


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: gq-triton COMMAND [OPTIONS]", "", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
