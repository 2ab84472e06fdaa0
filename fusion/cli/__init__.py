"""The command line, the only package that imports Hydra.

argv → configuration → plain mappings → :class:`fusion.program.FusionProgram`. Nothing heavy is
imported before the configuration is known to be good.
"""

from fusion.cli.main import main

__all__ = ["main"]
