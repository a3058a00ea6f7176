"""What a cache kept, merged and saved, as a table, a picture and a page."""

from .picture import Fates, new_figure, plot_merges, render
from .report import CacheReport, LayerReport, align, report_layers

__all__ = ["CacheReport", "Fates", "LayerReport", "align", "new_figure", "plot_merges", "render", "report_layers"]
