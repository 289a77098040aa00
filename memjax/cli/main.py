"""The `memjax` command: its groups, and what becomes of errors."""

from __future__ import annotations

import importlib
import sys

import click

from memjax import __version__
from memjax.errors import MemjaxError

# Name -> (module, attribute, one line). Modules are imported when their command runs: `--help` needs no JAX.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("memjax.cli.demo", "demo", "Write three documents and answer from them, beside base and plain prompt."),
    "write": ("memjax.cli.write", "write", "Write a text file into a memory and keep it in a bank."),
    "ask": ("memjax.cli.ask", "ask", "Ask a question; the bank's memories answer, or the base alone."),
    "chat": ("memjax.cli.chat", "chat", "Talk with the bank; every turn may be answered from another memory."),
    "bank": ("memjax.cli.bank", "bank", "List, search, update, delete, move and merge memories."),
    "eval": ("memjax.cli.eval", "evaluate", "Measure a base and its memories: questions, choices, needles, long texts."),
    "bench": ("memjax.cli.bench", "bench", "Measure speed and memory, as ratios, on random weights."),
    "plan": ("memjax.cli.plan", "plan", "Compile a step for a TPU slice that is not there, and say whether it fits."),
    "train": ("memjax.cli.train", "train", "Train the tiny base, or a bank's router."),
    "data": ("memjax.cli.data", "data", "Make training data of texts with the base itself."),
    "generate": ("memjax.cli.generate", "generate", "Continue a text with the base alone."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(
    cls=_Lazy,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog='Example: memjax write notes.txt --bank ./bank && memjax ask "When does the ferry leave?" --bank ./bank',
)
@click.version_option(__version__, prog_name="memjax")
@click.option("--debug", is_flag=True, help="Show a traceback where something goes wrong.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Latent memory for a frozen language model: write texts into small adapters, and answer from them."""
    ctx.obj = {"debug": debug}


def main(args: list[str] | None = None) -> None:
    """Run the command line; errors are one line on stderr and exit status 2, with a traceback under --debug only."""
    args = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in args
    # --debug may stand anywhere: people add it to the end of the command that failed.
    args = (["--debug"] if debug else []) + [a for a in args if a != "--debug"]
    try:
        code = cli.main(args, prog_name="memjax", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if debug:
            raise
        error.show()
        sys.exit(2)
    except MemjaxError as error:
        if debug:
            raise
        click.echo(f"memjax: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        click.echo("memjax: stopped; what was committed before is kept, nothing else", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        click.echo(f"memjax: {what}", err=True)
        sys.exit(2)
