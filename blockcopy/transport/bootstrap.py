"""The first code that a remote python3 runs. It reads the stages from standard input, and runs one of them.

`transport.payload` sends this text and the stages. Nothing is written to a file there. Older Pythons must reach
the message that they are too old, so the syntax here is that of Python 3.0.
"""

import sys

MARK = b"\n-- blockcopy begins here --\n"
"""Written to standard output when the stage begins. All output before the mark is the login's."""

OLDEST = (3, 9)


def begin(size: int) -> None:
    """Read a payload of `size` bytes from standard input, and run the command in the payload."""
    if sys.version_info < OLDEST:
        here, needed = ["%d.%d" % tuple(version[:2]) for version in (sys.version_info, OLDEST)]  # noqa: UP031
        sys.exit("%s is Python %s, and blockcopy needs %s or newer" % (sys.executable, here, needed))  # noqa: UP031
    import json
    import os
    import zlib
    from importlib import import_module
    from importlib.machinery import ModuleSpec

    received = b""
    while len(received) < size:
        data = os.read(0, size - len(received))
        if not data:
            sys.exit("the stages of blockcopy did not arrive here in full")
        received += data
    # Only our own end writes the payload, which is code. So the parser need not be strict.
    payload = json.loads(zlib.decompress(received).decode())
    modules = payload["modules"]

    class PayloadImporter:
        """An importer of the modules in the payload."""

        @staticmethod
        def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
            if name in modules:
                return ModuleSpec(name, PayloadImporter, is_package=name in payload["packages"])  # type: ignore[arg-type]
            return None

        @staticmethod
        def create_module(spec):  # type: ignore[no-untyped-def]
            return None

        @staticmethod
        def exec_module(module):  # type: ignore[no-untyped-def]
            code = compile(modules[module.__name__], module.__name__, "exec")
            exec(code, module.__dict__)

    sys.meta_path.insert(0, PayloadImporter)
    arguments = payload["arguments"]
    if payload["under_home"]:  # `~`, unless a shell has expanded it
        arguments[-1] = os.path.expanduser(sys.argv[-1]) + arguments[-1]
    program = import_module(payload["program"])
    os.write(1, MARK)
    program.main(arguments)
