"""Logit datasets that others made, as captures with honest marks.

``FORMATS`` is the registry: one module per format, found by name and imported on use. Each defines
``open_reader(config: ImportConfig, table: TokenTable) -> Reader``; what a reader gives says ``samples.py``.
"""

FORMATS = {
    "distillkit": "xtoken.pipeline.imports.distillkit",
    "axolotl": "xtoken.pipeline.imports.axolotl",
    "api-trace": "xtoken.pipeline.imports.api_trace",
}
