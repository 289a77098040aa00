"""`memjax data`: training data that a base makes of texts."""

from __future__ import annotations

import click

from memjax.cli.common import base_option, console, counting_bar, emit, json_option, load_base, read_text


@click.group()
def data() -> None:
    """Make training data."""


@data.command(epilog="Example: memjax data selfgen speeches/ --base tiny --out records passage=160")
@click.argument("arguments", metavar="TEXTS... [OVERRIDES]", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(), required=True, help="Folder of the records; a run that was stopped goes on in it."
)
@base_option
@json_option
def selfgen(arguments: tuple[str, ...], out: str, base_name: str | None, as_json: bool) -> None:
    """Questions about any texts, asked and answered by the base itself, with its most likely tokens.

    TEXTS are files, or folders of .txt and .md files; OVERRIDES are key=value pairs. A hypernetwork is trained on the
    records with `memjax train hypernet … data.records=OUT data.recorded=0.5`.
    """
    from pathlib import Path

    from memjax.config import load_config
    from memjax.write.hypernet.selfgen import SelfgenConfig, texts_of
    from memjax.write.hypernet.selfgen import selfgen as make

    overrides = tuple(a for a in arguments if "=" in a and not Path(a).exists())
    config = load_config(SelfgenConfig, None, overrides)
    texts = texts_of([a for a in arguments if a not in overrides], read_text)
    with counting_bar() as bar:
        base = load_base(base_name)
        records = make(base, texts, config, out, progress=lambda done, total: bar("passages", done, total))
    told = {"records": len(records), "texts": len(texts), "out": str(out)}
    if as_json:
        emit(told)
        return
    console().print(f"{told['records']:,} questions about {told['texts']} texts are in {out}")


@data.command(name="import-hyper", epilog="Example: memjax data import-hyper d2l.safetensors --base gemma --out hyper")
@click.argument("checkpoint", type=click.Path())
@click.option("--out", type=click.Path(), required=True, help="Folder of the hypernetwork.")
@base_option
@json_option
def import_hyper(checkpoint: str, out: str, base_name: str | None, as_json: bool) -> None:
    """Doc-to-LoRA's published CHECKPOINT, as safetensors, for `memjax write --how internalize`.

    What is published is a pickle, which memjax does not open: python launch/convert_doc_to_lora.py makes safetensors of it.
    """
    from pathlib import Path

    from memjax.write.hypernet.files import save_hyper
    from memjax.write.hypernet.published import read_published

    base = load_base(base_name)
    network = read_published(checkpoint, base)
    saved = save_hyper(Path(out), network, base.name, {"published": Path(checkpoint).name})
    if as_json:
        emit({"hyper": out, "id": saved.id})
        return
    console().print(f"the hypernetwork {saved.id[:12]} of {base.name} is in {out}")
