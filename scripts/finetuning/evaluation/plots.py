"""Pictures of a run, as PNG bytes; each in a light and a dark form, for files and for the report page."""

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour blindness tell apart.
COLOURS = {"base": "#E69F00", "tuned": "#0072B2", "reference": "#009E73"}
DARK_COLOURS = COLOURS | {"tuned": "#56B4E9"}
LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "line": "#d0d7de"}
DARK = {"paper": "#161b22", "ink": "#e6edf3", "line": "#3d444d"}


class Picture(NamedTuple):
    """One plot twice: `light` and `dark` PNG bytes."""

    light: bytes
    dark: bytes


def draw(plot: Callable[["Figure", dict[str, str]], None], width: float = 5.2, height: float = 4.2) -> Picture:
    """Draw with `plot(figure, colours)` on light and on dark paper; sizes in inches, at 160 pixels to the inch."""
    import matplotlib  # half a second of import, which only who draws should pay
    from matplotlib.figure import Figure

    pictures = []
    for paper, colours in ((LIGHT, COLOURS), (DARK, DARK_COLOURS)):
        style = {
            "figure.facecolor": paper["paper"],
            "axes.facecolor": paper["paper"],
            "axes.edgecolor": paper["line"],
            "axes.labelcolor": paper["ink"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": paper["line"],
            "grid.alpha": 0.5,
            "text.color": paper["ink"],
            "xtick.color": paper["ink"],
            "ytick.color": paper["ink"],
            "legend.frameon": False,
            "font.size": 11,
        }
        with matplotlib.rc_context(style):
            # A Figure of its own needs no display and leaves pyplot's state alone.
            figure = Figure(figsize=(width, height), layout="constrained")
            plot(figure, colours | {"ink": paper["ink"]})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160)
            pictures.append(buffer.getvalue())
    return Picture(*pictures)


def predicted_against_true(true: Sequence[int], predicted: dict[str, Sequence[int | None]]) -> Picture:
    """A panel for each of `base` and `tuned` that is given: predicted over true count, larger dots where items coincide.

    A prediction far above the largest true count is drawn at the upper edge; an unparsable one is only counted in the
    panel's title.
    """
    top = math.ceil(1.3 * max(max(true), 1))

    def plot(figure: "Figure", colours: dict[str, str]) -> None:
        panels = figure.subplots(1, len(predicted), sharey=True, squeeze=False)[0]
        for axes, (name, guesses) in zip(panels, predicted.items(), strict=True):
            parsed = [(truth, min(guess, top)) for truth, guess in zip(true, guesses, strict=True) if guess is not None]
            beyond = sum(guess is not None and guess > top for guess in guesses)
            dots = Counter(parsed)
            axes.plot([0, top], [0, top], color=colours["ink"], linewidth=1, alpha=0.6)
            if dots:
                x, y = zip(*dots, strict=True)
                sizes = [14 + 10 * (number - 1) for number in dots.values()]
                axes.scatter(x, y, s=sizes, color=colours[name], alpha=0.55, linewidths=0)
            remarks = [f"{len(guesses) - len(parsed)} unparsable"] if len(parsed) < len(guesses) else []
            remarks += [f"{beyond} above {top}"] if beyond else []
            axes.set_title(", ".join([name, *remarks]), fontsize=11)
            axes.set_xlim(0, top)
            axes.set_ylim(0, top * 1.03)
            axes.set_aspect("equal")
            axes.set_xlabel("people, true")
        panels[0].set_ylabel("people, answered")

    return draw(plot, width=3.5 * len(predicted) + 0.7, height=3.9)


def error_by_crowd_size(
    sizes: Sequence[tuple[int, int]], errors: dict[str, Sequence[float | None]], measure: str
) -> Picture:
    """Bars for each range of true counts: one for each of `base`, `tuned` and `reference` (a trivial guess)."""

    def plot(figure: "Figure", colours: dict[str, str]) -> None:
        axes: Axes = figure.subplots()
        width = 0.8 / len(errors)
        for number, (name, values) in enumerate(errors.items()):
            places = [place + (number - (len(errors) - 1) / 2) * width for place in range(len(sizes))]
            label = "train median" if name == "reference" else name
            axes.bar(places, [value or 0 for value in values], width * 0.92, color=colours[name], label=label)
        labels = [str(low) if low == high else f"{low}–{high}" for low, high in sizes]
        axes.set_xticks(range(len(sizes)), labels)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("people in the picture, true")
        axes.set_ylabel(measure)
        axes.legend(loc="upper left")
        axes.margins(y=0.25)

    return draw(plot)


def loss_curves(log_history: Sequence[dict[str, Any]]) -> Picture | None:
    """Training and validation loss over the steps of `trainer_state.json`; None when no loss was logged."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not train and not validation:
        return None

    def plot(figure: "Figure", colours: dict[str, str]) -> None:
        axes: Axes = figure.subplots()
        for name, points, style in (("training", train, "-"), ("validation", validation, "o-")):
            if points:
                colour = colours["tuned" if name == "training" else "base"]
                axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw(plot)
