"""The command line: puts the commands together, and turns what goes wrong into one line."""

from __future__ import annotations

import sys
import warnings

from counterflow import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when all went well, 2 for bad input, 130 after Ctrl-C."""
    try:
        import tyro

        from counterflow.commands import console
        from counterflow.commands.bench import Bench
        from counterflow.commands.density import Density
        from counterflow.commands.distill import Distill
        from counterflow.commands.export import Export
        from counterflow.commands.posterior import Posterior
        from counterflow.commands.sample import Sample
        from counterflow.commands.score import Score
        from counterflow.commands.training import together
        from counterflow.commands.vae import Vae
    except ImportError as error:
        print(f"counterflow: {error.name} is not installed; pip install 'counterflow[all]'", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: console.note(f"counterflow: {message}")
        try:
            command = tyro.extras.subcommand_cli_from_dict(
                {
                    "vae": Vae,
                    "posterior": Posterior,
                    "density": Density,
                    "distill": Distill,
                    "sample": Sample,
                    "score": Score,
                    "export": Export,
                    "bench": Bench,
                },
                prog="counterflow",
                description=f"Autoregressive normalizing flows: VAEs, posteriors, tables. Version {__version__}.",
                args=arguments,
            )
            with together():
                return command.run()
        except (ValueError, OSError, ImportError) as error:
            console.note(f"counterflow: {' '.join(str(error).split())}")
            return 2
        except KeyboardInterrupt:
            console.note("interrupted")
            return 130


if __name__ == "__main__":
    sys.exit(main())
