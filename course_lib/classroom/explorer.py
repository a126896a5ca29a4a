"""A picture with controls, which is drawn anew when one of them moves.

    slots = Control("slots", [1, 2, 4])
    Explorer({"slots": slots}, lambda slots: View([plot_slots([8, 2, 5, 3], slots)]))

A notebook shows it by naming it in the last line of a cell. The controls are ipywidgets (7.7 or
later). Where those are absent, and where a notebook is only read, there is the picture of the first
settings. The picture is an image, so it needs no front end but the widgets' own.
"""

import asyncio
import base64
import html
import importlib.util
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from matplotlib.figure import Figure

# What arrives within this time is one change: keys that are held down, a player that runs ahead.
SETTLE_S = 0.05

GAP = 16  # pixels between two figures

# Pictures that are kept, to come back to at once.
MOST_KEPT = 64

NO_WIDGETS = (
    "ipywidgets is not installed here, so this is the picture without its controls; "
    "pip install ipywidgets brings them."
)


@dataclass(frozen=True)
class Control:
    """Something to choose from.

    Args:
        label: what is chosen, and its unit, as in "arrivals (requests/s)".
        options: the values; a mapping gives them by the words to show.
        value: the one at the beginning; where it is not among them, it is the first.
        kind: a player is a slider that moves by itself. A switch is off or on, and goes off when
            another control moves.
        form: how an option is shown; there is room for 8 characters beside a slider.
    """

    label: str
    options: Sequence[Any] | Mapping[str, Any] = (False, True)
    value: Any = None
    kind: Literal["slider", "menu", "player", "switch"] = "slider"
    form: str = "{}"

    @property
    def shown(self) -> dict[str, Any]:
        """The values by the words that stand for them."""
        if isinstance(self.options, Mapping):
            return dict(self.options)
        return {self.form.format(option): option for option in self.options}

    @property
    def first(self) -> Any:
        """The value at the beginning."""
        values = list(self.shown.values())
        return self.value if self.value in values else values[0]


@dataclass(frozen=True)
class View:
    """What there is to see: figures, one below the other, and a text in HTML above them."""

    figures: Sequence[Figure] = ()
    text: str = ""


class Explorer:
    """Controls, and what they show.

    Args:
        controls: by the name of the argument that `draw` gets.
        draw: makes the view of the values chosen; the same values must give the same view.
    """

    def __init__(self, controls: Mapping[str, Control], draw: Callable[..., View]) -> None:
        self.controls = controls
        self.draw = draw
        self._drawn = lru_cache(MOST_KEPT)(self._drawn_anew)
        self._shown = tuple(control.first for control in controls.values())
        self._is_due = False
        #: What is to be seen now: an image, empty if there are no figures, and a text in HTML.
        self.picture, self.text = self._drawn(self._shown)
        #: By the name of the control, the widget that has its `value`; empty without ipywidgets.
        self.widgets: dict[str, Any] = {}
        if importlib.util.find_spec("ipywidgets"):
            self.box = self._make_widgets()
        else:
            print(NO_WIDGETS)

    def _drawn_anew(self, values: tuple[Any, ...]) -> tuple[bytes, str]:
        view = self.draw(**dict(zip(self.controls, values, strict=True)))
        return _png(view.figures), view.text

    def _make_widgets(self) -> Any:
        import ipywidgets

        rows = [self._make_control(name, control) for name, control in self.controls.items()]
        row_layout = ipywidgets.Layout(flex_flow="row wrap")
        self._state = ipywidgets.HTML()
        self._text = ipywidgets.HTML()
        self._tell(self.text)
        self._image = ipywidgets.Image(
            value=self.picture, format="png", layout=ipywidgets.Layout(max_width="100%")
        )
        shown = [self._image] if self.picture else []
        return ipywidgets.VBox(
            [ipywidgets.Box([*rows, self._state], layout=row_layout), self._text, *shown]
        )

    def _make_control(self, name: str, control: Control) -> Any:
        """The widgets of a control in a box. Notes down the one whose value it is."""
        import ipywidgets

        style = {"description_width": "initial"}
        layout = ipywidgets.Layout(width="380px", margin="2px 12px 2px 0")
        options, value = list(control.shown.items()), control.first
        if control.kind == "switch":
            widget = box = ipywidgets.ToggleButton(value=value, description=control.label)
        elif control.kind == "menu":
            widget = box = ipywidgets.Dropdown(
                options=options, value=value, description=control.label, style=style, layout=layout
            )
        elif control.kind == "player":
            values = list(control.shown.values())
            limits = {"min": values[0], "max": values[-1], "value": value}
            widget = ipywidgets.IntSlider(
                **limits, description=control.label, style=style, layout=layout,
                continuous_update=False,
            )  # fmt: skip
            play = ipywidgets.Play(**limits, interval=600)
            ipywidgets.jslink((play, "value"), (widget, "value"))
            box = ipywidgets.HBox([play, widget])
        else:
            widget = box = ipywidgets.SelectionSlider(
                options=options, value=value, description=control.label, style=style, layout=layout,
                continuous_update=False,
            )  # fmt: skip
        widget.observe(lambda _: self._changed(name), names="value")
        self.widgets[name] = widget
        return box

    def _changed(self, name: str) -> None:
        """Draw soon, where the kernel has a loop to do so, else now."""
        if self.controls[name].kind != "switch":
            for other, control in self.controls.items():
                if control.kind == "switch":
                    self.widgets[other].value = False
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._redraw()
            return
        if not self._is_due:
            self._is_due = True
            loop.call_later(SETTLE_S, self._redraw)

    def _redraw(self) -> None:
        """Show the view of the values that the widgets have now."""
        self._is_due = False
        values = tuple(widget.value for widget in self.widgets.values())
        if values == self._shown:
            return
        self._state.value = "<i>computing …</i>"
        begin = time.perf_counter()
        try:
            self.picture, self.text = self._drawn(values)
        except Exception as error:  # of the student's own part, maybe; nobody else would show it
            message = html.escape(f"{type(error).__name__}: {error}")
            self._tell(f"<b>This could not be drawn.</b> {message}")
            self._state.value, self._shown = "", ()
            return
        self._image.value, self._shown = self.picture, values
        self._tell(self.text)
        self._state.value = f"computed in {time.perf_counter() - begin:.1f} s"

    def _tell(self, text: str) -> None:
        """Show a text in lines as close as those of a notebook."""
        self._text.value = f"<div style='line-height: 1.4'>{text}</div>"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The widgets for a front end that has them, the first picture for others."""
        bundle: dict[str, Any] = {"text/plain": "\n".join(c.label for c in self.controls.values())}
        if self.picture:
            bundle["image/png"] = base64.b64encode(self.picture).decode()
        else:
            bundle["text/html"] = self.text
        if self.widgets:
            bundle["application/vnd.jupyter.widget-view+json"] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.box.model_id,
            }
        return bundle


def _png(figures: Sequence[Figure]) -> bytes:
    """The figures as one image, below each other; nothing of none."""
    from PIL import Image

    pages = []
    for figure in figures:
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pages.append(Image.open(file).convert("RGB"))
    if len(pages) < 2:
        return file.getvalue() if pages else b""
    width = max(page.width for page in pages)
    height = sum(page.height for page in pages) + GAP * (len(pages) - 1)
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height + GAP
    file = io.BytesIO()
    whole.save(file, format="png")
    return file.getvalue()
