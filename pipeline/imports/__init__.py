"""Logit datasets that others made, as captures with honest marks.

``FORMATS`` is the registry: one module per format, found by name and imported on use. Each defines
``open_reader(config: ImportConfig, spelling: Spelling, form: str) -> Reader``; what a reader gives says ``samples.py``;
and ``guess_form(config) -> str | None``, the form that columns show without a look at rows.
``spelling`` has the tokenizer and its table (``documents.py``); ``form`` is "text", "ids" (control tokens and text told
apart, all text taught) or "messages" (only answers taught).
"""

FORMATS = {
    "distillkit": "xtoken.pipeline.imports.distillkit",
    "axolotl": "xtoken.pipeline.imports.axolotl",
    "api-trace": "xtoken.pipeline.imports.api_trace",
}
