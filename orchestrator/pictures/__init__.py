"""Maps and their validation as static pictures: PNG, SVG or PDF by the file's suffix.

The same data give the same bytes. Nothing here is computed: what is drawn comes from `mapgrid`,
`compare` and the validation table.
"""

from orchestrator.pictures.drawing import SUFFIXES, check_picture
from orchestrator.pictures.heat import draw_comparison, draw_maps
from orchestrator.pictures.validation import draw_validation

__all__ = ["SUFFIXES", "check_picture", "draw_comparison", "draw_maps", "draw_validation"]
