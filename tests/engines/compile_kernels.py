# pyright: basic
"""Compile every kernel ahead of time and print one JSON line per kernel, case and architecture.

The script runs in a separate process without TRITON_INTERPRET: an interpreted kernel cannot be
compiled. No GPU is needed. ``test_kernel_compile.py`` checks the lines that
``python tests/engines/compile_kernels.py`` prints.
"""

import json
import sys
import tempfile
from itertools import chain

from compile_cluster_cases import cluster_cases
from compile_law_cases import law_cases
from compile_targets import EVERY_CASE, wanted_of
from kernel_lines import Record, compile_for_all, forget_lines, keys_of, line_of, source_of


def main() -> None:
    """Print one JSON line per kernel, case and architecture.

    With ``--record`` every kernel is compiled, and recorded. `make test-all` compiles all, too. Any
    other run reads from the record what has not changed.
    """
    forget_lines()
    recording, record, written = "--record" in sys.argv, Record(), {}
    known = {} if recording or EVERY_CASE else record.lines
    with tempfile.TemporaryDirectory() as folder:
        for name, case, kernel, types, constants in chain(law_cases(), cluster_cases()):
            source, wanted = source_of(kernel, types, constants), wanted_of(case, constants)
            keys = keys_of(source, wanted) if recording or record.lines else {}
            lines = {arch: known[key] for arch, key in keys.items() if key in known}
            absent = {arch: one for arch, one in wanted.items() if arch not in lines}
            if absent:
                compiled = compile_for_all(source, absent, folder)
                lines |= {arch: line_of(one, constants.get("BLOCK")) for arch, one in compiled}
            for arch, line in lines.items():
                about = {"kernel": name, "case": case, "arch": arch, "key": keys.get(arch)}
                sys.stdout.write(json.dumps(about | line) + "\n")
            written |= {keys[arch]: line for arch, line in lines.items()} if keys else {}
    if recording:
        record.write(written)


if __name__ == "__main__":
    main()
