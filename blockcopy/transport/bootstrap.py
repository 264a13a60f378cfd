"""What a remote python3 runs first: it takes the copy stages from its standard input, and runs one of them.

`payload` sends this text, and what it waits for. Nothing is written to a file there. Older Pythons have to
get as far as the word that they are too old, so this module has no syntax that Python 3.0 does not know.
"""

import sys

MARK = b"\n-- blockcopy begins here --\n"
"""Said on standard output when the stage begins: what a login has printed lies before it."""

OLDEST = (3, 9)


def begin(size: int) -> None:
    """Read a parcel of `size` bytes from standard input, and be the command that is in it."""
    if sys.version_info < OLDEST:
        here, needed = ["%d.%d" % tuple(version[:2]) for version in (sys.version_info, OLDEST)]  # noqa: UP031
        sys.exit("%s is Python %s, and blockcopy needs %s or newer" % (sys.executable, here, needed))  # noqa: UP031
    sys.path[:] = [folder for folder in sys.path if folder]  # nothing in the login's folder is taken for a module
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
    parcel = json.loads(zlib.decompress(received).decode())
    modules = parcel["modules"]

    class Carried:
        """Finds and loads the modules of the parcel."""

        @staticmethod
        def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
            if name in modules:
                return ModuleSpec(name, Carried, is_package=name in parcel["packages"])  # type: ignore[arg-type]
            return None

        @staticmethod
        def create_module(spec):  # type: ignore[no-untyped-def]
            return None

        @staticmethod
        def exec_module(module):  # type: ignore[no-untyped-def]
            code = compile(modules[module.__name__], module.__name__, "exec")
            exec(code, module.__dict__)

    sys.meta_path.insert(0, Carried)
    arguments = parcel["arguments"]
    if parcel["under_home"]:  # a shell has said which folder `~` is; else we do
        arguments[-1] = os.path.expanduser(sys.argv[-1]) + arguments[-1]
    program = import_module(parcel["program"])
    os.write(1, MARK)
    program.main(arguments)
