"""The one file of code that goes along with a checkpoint: with it, dpn need not be installed. No torch."""

import importlib
from pathlib import Path

CODE_MODULE = "modeling_dpn_llava"
CODE_FILE = f"{CODE_MODULE}.py"
MODEL_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining")


def auto_map(stem: str) -> dict[str, str]:
    """Return where transformers finds a family's classes in that file.

    Args:
        stem: Start of the names of the family's classes.
    """
    return {
        "AutoConfig": f"{CODE_MODULE}.{stem}Config",
        "AutoModel": f"{CODE_MODULE}.{stem}Model",
        **dict.fromkeys(MODEL_CLASSES, f"{CODE_MODULE}.{stem}ForConditionalGeneration"),
    }


def write_code(folder: Path) -> None:
    """Write the file into a checkpoint's folder."""
    if __name__.rpartition(".")[2] == CODE_MODULE:  # this is that file
        source = Path(__file__).read_text(encoding="utf-8")
    else:  # not an import statement: what merges the modules is no part of them
        source = importlib.import_module("dpn_cli.modeling.bundle").bundle_modeling()
    (folder / CODE_FILE).write_text(source, encoding="utf-8")
