"""The subject of the embedded teacher: the demo's pictures."""

from pathlib import Path

from dpn_cli.demo.drawing import draw
from dpn_cli.demo.pictures import GRAINS, GRID, scenes
from dpn_cli.demo.questions import ask, ask_on
from tools.teacher.assembly import build_model, build_processor
from tools.teacher.labels import CLASSES, patch_labels
from tools.teacher.subject import Subject

WEIGHTS = {
    "background": 0.4,
    "count": 1.8,
    "colour": 0.9,
    "shape": 0.6,
    "list": 0.6,
    "relation": 1.6,
    "letter": 0.8,
    "extreme": 1.6,
    "owner": 1.2,
    "compare": 1.8,
    "word": 0.5,
    "after": 0.6,
    "lead": 1.2,
    "next": 1.2,
    "follow": 2.5,
    "path": 1.2,
}
"""How often each kind is asked, hard ones more often."""

DEMO = Subject(
    grid=GRID,
    grains=GRAINS,
    weights=WEIGHTS,
    classes=CLASSES,
    written="glyph",
    after_projector=False,
    text=192,
    answers=44,  # about a quarter more than are needed
    scenes=scenes,
    draw=draw,
    labels=patch_labels,
    ask=ask,
    ask_on=ask_on,
    card=Path(__file__).parent,
    build_processor=build_processor,
    build_model=build_model,
)
