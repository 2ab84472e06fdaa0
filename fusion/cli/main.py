"""``fusion_bench``: from the arguments to the job."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from fusion.cli.plain_options import flag, given_options
from fusion.config_folder import config_folder
from fusion.errors import UserError

PRIMARY = "fusion_bench"
SUMMARIZE = "summarize="
EXPORT = "export="
PUSH = "push="
CARD = "card="
_EXPORT_OPTIONS = ("export", "to", "task", "shape", "overwrite")
_PUSH_OPTIONS = ("push", "to", "private")
# The exit codes of a shell for a process that a signal ended: 128 and its number.
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); like an interruption, this is not an error."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 and a short message on a user's mistake."""
    if arguments is None:  # the process is ours
        from fusion.cli.streams import make_streams_robust

        make_streams_robust()
        _end_like_an_interruption(os.getpid())
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _answer(arguments)
    except UserError as error:
        from fusion.cli.mistakes import tell

        tell(error)
    except OSError as error:
        from fusion.cli.mistakes import limit_of_machine, tell

        if (limit := limit_of_machine(error)) is None:
            raise
        tell(limit)
    except KeyboardInterrupt:
        sys.stderr.write("\nfusion_bench: interrupted\n")
        sys.exit(_INTERRUPTED)
    except Terminated:
        sys.stderr.write("\nfusion_bench: terminated\n")
        sys.exit(_TERMINATED)


def _answer(arguments: list[str]) -> None:
    if not arguments or {"-h", "--help"} & set(arguments):
        from fusion.cli.help import help_text

        sys.stdout.write(help_text(config_folder(), arguments))
        return
    if "--version" in arguments:
        from fusion import __version__

        sys.stdout.write(f"fusion_bench {__version__}\n")
        return
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # appended: a user's file never shadows an installed one
    if any(argument.startswith(SUMMARIZE) for argument in arguments):
        _summarize(arguments)
    elif any(argument.startswith(EXPORT) for argument in arguments):
        _export(arguments)
    elif any(argument.startswith(PUSH) for argument in arguments):
        _push(arguments)
    elif any(argument.startswith(CARD) for argument in arguments):
        from fusion.cli.card import write_cards

        write_cards(arguments)
    else:
        _hydra(arguments)


def _end_like_an_interruption(process: int) -> None:
    """Let SIGTERM unwind the process, so that no unfinished file and no lock is left behind."""

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() != process:  # a worker that was forked from it ends at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def _summarize(arguments: list[str]) -> None:
    """Write table, figures and page of the runs in a folder again, without a configuration."""
    if len(arguments) > 1:
        others = ", ".join(a for a in arguments if not a.startswith(SUMMARIZE))
        raise UserError(f"{SUMMARIZE}FOLDER stands alone; leave {others or 'one of them'} out")
    from fusion.study import summarise

    sys.stdout.write(summarise(arguments[0].removeprefix(SUMMARIZE)).text)


def _export(arguments: list[str]) -> None:
    """Write a merged network, or one task of it, as a plain network."""
    given = given_options("export", arguments, _EXPORT_OPTIONS)
    if not given["export"] or not given.get("to"):
        raise UserError("export needs two files: export=merged.safetensors to=plain.safetensors")
    sizes = given.get("shape", "").strip("[]").replace(",", " ").split()
    if not all(size.isdecimal() for size in sizes):
        raise UserError(f"shape={given['shape']}: give three sizes, such as shape=[3,224,224]")
    overwrite = flag(given, "overwrite", default=False)
    from fusion.export import export

    written = export(
        given["export"],
        given["to"],
        task=given.get("task"),
        shape=[int(size) for size in sizes] or None,
        overwrite=overwrite,
    )
    sys.stdout.write(f"Wrote {written}\n")


def _push(arguments: list[str]) -> None:
    """Upload a run to the Hugging Face hub."""
    given = given_options("push", arguments, _PUSH_OPTIONS)
    if not given["push"] or not given.get("to"):
        raise UserError("push needs a run's folder and a repository: push=FOLDER to=user/name")
    private = flag(given, "private", default=True)
    from fusion.model_card import push

    sys.stdout.write(f"Uploaded {push(given['push'], given['to'], private=private)}\n")


def _hydra(arguments: list[str]) -> None:
    import hydra

    from fusion.cli import mistakes
    from fusion.cli.arguments import checked_arguments
    from fusion.cli.folders import extra_folders
    from fusion.cli.job import job, register_resolvers
    from fusion.cli.yaml_files import check_files

    folder = config_folder()
    arguments = checked_arguments(arguments, folder)
    check_files(extra_folders(arguments), arguments)
    register_resolvers()
    # Hydra then raises instead of printing and exiting: the message to the user is composed here.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [sys.argv[0], *arguments]
    entry = hydra.main(version_base="1.3", config_path=str(folder), config_name=PRIMARY)(job)
    with mistakes.explaining(arguments, folder):
        entry()
