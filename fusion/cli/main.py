"""``fusion_bench``: from the arguments to the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fusion.errors import UserError

PRIMARY = "fusion_bench"
SUMMARIZE = "summarize="
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on a user's mistake, told in a sentence or two."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        from fusion.cli.help import help_text

        sys.stdout.write(help_text(config_dir(), arguments))
        return
    if "--version" in arguments:
        from fusion import __version__

        sys.stdout.write(f"fusion_bench {__version__}\n")
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # appended: a user's file never shadows an installed one
    try:
        if any(argument.startswith(SUMMARIZE) for argument in arguments):
            _summarize(arguments)
        else:
            _hydra(arguments)
    except UserError as error:
        from fusion.cli.mistakes import tell

        tell(error)
    except KeyboardInterrupt:
        sys.stderr.write("\nfusion_bench: interrupted\n")
        sys.exit(_INTERRUPTED)


def config_dir() -> Path:
    """Return the folder of the shipped YAML: the wheel's own, or the checkout's."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "config"
    return shipped if shipped.is_dir() else package.parent / "config"


def _summarize(arguments: list[str]) -> None:
    """Make table, figures and page of the runs in a folder anew; no configuration takes part."""
    if len(arguments) > 1:
        others = ", ".join(a for a in arguments if not a.startswith(SUMMARIZE))
        raise UserError(f"{SUMMARIZE}FOLDER stands alone; leave {others or 'one of them'} out")
    from fusion.study import summarise

    sys.stdout.write(summarise(arguments[0].removeprefix(SUMMARIZE)).text)


def _hydra(arguments: list[str]) -> None:
    import hydra

    from fusion.cli import mistakes
    from fusion.cli.job import job, register_resolvers

    mistakes.check_flags(arguments)
    register_resolvers()
    # Hydra then raises instead of printing and exiting: what to say to the user is ours to choose.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *mistakes.without_null(arguments)]
    entry = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=PRIMARY)(job)
    try:
        entry()
    except mistakes.CONFIGURATION_ERRORS as error:
        if not mistakes.is_configuration_error(error):
            raise
        raise UserError(mistakes.explain(error, arguments, config_dir())) from error
    except OSError as error:
        if not mistakes.is_from_making_a_folder(error):
            raise
        raise UserError(
            f"output_path: cannot make the run folder '{error.filename}' ({error.strerror}); "
            f"choose a folder that you may write to"
        ) from error
