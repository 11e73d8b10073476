"""What recurrent networks are used for: one task on real data for each use, split, encoded and ready for training.

`load("weather")` returns the sequences of `APPLICATIONS["weather"]` as `SequenceModel` takes them, with what the best
prediction without any learning reaches. Nothing is fitted on more than the training part, neither scales nor alphabets
of events; the split is the same every time, and for what happens in time it is by time.
"""

import gzip
import importlib
import io
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike, NDArray

from .checks import check_choice, check_dtype
from .datasets import digit_images, shipped
from .kernels import Array
from .model import SequenceModel
from .tasks import Task, dataset

__all__ = ["APPLICATIONS", "Application", "Data", "Part", "evaluate", "load", "measure", "skill"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Sequences x (T, N, I), zero past their ends; targets; lengths (N,), and target_lengths (N,) of generated ones.

    All as `SequenceModel.loss_and_gradients` takes them.
    """

    x: Array
    targets: Array
    lengths: Indices | None
    target_lengths: Indices | None


class _Built(NamedTuple):
    """All sequences of an application, and the numbers of those of each part (training, validation, test)."""

    x: Array
    targets: Array
    lengths: Indices | None
    split: tuple[Indices, Indices, Indices]
    symbols: Sequence[str] = ()
    target_lengths: Indices | None = None


@dataclass(frozen=True)
class Application:
    """One use of recurrent networks.

    origin names its data in `datasets.ORIGINS`; topology and loss are those of `SequenceModel`; metric: "accuracy",
    "bits a symbol" (the loss in bits) or "squared error" (in variances of the training part); trivial: the prediction
    without learning that the baseline comes from: "majority" (the commonest class), "unigram" (the frequencies of the
    symbols), "no change" (of what is forecast) or "persistence" (the last frame, or the mean one if that is better);
    build makes the sequences, and its docstring says how, and how they are split.
    """

    name: str
    use: str
    origin: str
    topology: str
    loss: str
    metric: str
    trivial: str
    build: Callable[..., "_Built"]

    @property
    def preparation(self) -> str:
        """How data became sequences, and how they are split."""
        return " ".join((self.build.__doc__ or "").split())


@dataclass(frozen=True)
class Data:
    """A loaded application: its parts; sizes of the model; the baseline in the metric; what the classes stand for."""

    application: Application
    version: str
    digest: str
    train: Part
    validation: Part
    test: Part
    input_size: int
    output_size: int
    baseline: float
    symbols: tuple[str, ...]

    def task(self) -> Task:
        """Return the training part as a task for `train`."""
        kind, part = self.application, self.train
        return dataset(
            part.x,
            part.targets,
            part.lengths,
            topology=kind.topology,
            loss=kind.loss,
            target_lengths=part.target_lengths,
            output_size=self.output_size,
            name=kind.name,
        )

    def model(self, cell: str, hidden_size: int, *, seed: int | None = None, **options: Any) -> SequenceModel:
        """Return an untrained model for these sequences, see `Task.model`."""
        return self.task().model(cell, hidden_size, dtype=self.train.x.dtype, seed=seed, **options)


@cache
def load(name: str, dtype: DTypeLike = "float32") -> Data:
    """Return an application's sequences, kept for the next call.

    Raises ValueError for an unknown name and for other data than expected, ImportError without the package.
    """
    application = APPLICATIONS[check_choice("name", name, APPLICATIONS)]
    kind, origin = check_dtype("dtype", dtype), shipped(application.origin)
    built = application.build()
    classes = application.loss == "cross_entropy"
    targets = built.targets if classes else built.targets.astype(kind)
    train, validation, test = (
        Part(
            np.ascontiguousarray(built.x[:, part], kind),
            np.ascontiguousarray(targets[..., part] if classes else targets[..., part, :]),
            *(None if ends is None else ends[part] for ends in (built.lengths, built.target_lengths)),
        )
        for part in built.split
    )
    inputs, outputs = built.x.shape[-1], len(built.symbols) if classes else targets.shape[-1]
    if application.topology == "one_to_many":
        outputs = inputs  # the output is the next input
    baseline = _TRIVIAL[application.trivial](train, test)
    about = (application, origin.version, origin.digest)
    return Data(*about, train, validation, test, inputs, outputs, baseline, tuple(built.symbols))


def evaluate(model: SequenceModel, data: Data, part: Part) -> float:
    """Return the metric of a model on a part of its data; generating models are told the symbols before each.

    Raises as `SequenceModel.loss_and_gradients`.
    """
    return measure(model, data.application.metric, part)


def measure(model: SequenceModel, metric: str, part: Part) -> float:
    """Return the metric, one of those of `Application`, of a model on any sequences, see `evaluate`."""
    if metric == "accuracy":
        chances, _ = model.predict(part.x, part.lengths)
        return float(np.mean((chances.argmax(axis=-1) == part.targets) & np.isfinite(chances).all(axis=-1)))
    if model.generates:
        ends = part.target_lengths
        loss = model.loss_and_gradients(part.x, part.targets, part.lengths, target_lengths=ends).loss
    else:
        loss = model.mean_loss(part.x, part.targets, part.lengths)
    return loss / math.log(2) if metric == "bits a symbol" else loss


def skill(metric: str, value: float, baseline: float) -> float:
    """Return the share of the baseline's error that a model removes: 0 is no better, 1 is perfect, of any metric."""
    error, trivial = (1 - number if metric == "accuracy" else number for number in (value, baseline))
    return 1 - error / trivial


# Predictions without learning ---------------------------------------------------------------------------------------


def _majority(train: Part, test: Part) -> float:
    return float(np.mean(test.targets == np.bincount(train.targets).argmax()))


def _scored(part: Part) -> Indices:
    """Return all symbols that are to be predicted."""
    lengths = part.lengths if part.target_lengths is None else part.target_lengths
    assert lengths is not None
    scored: Indices = part.targets[np.arange(len(part.targets))[:, None] < lengths]
    return scored


def _unigram(train: Part, test: Part) -> float:
    """Bits a symbol of the test part under the frequencies of the training part, each symbol counted once more."""
    seen, told = _scored(train), _scored(test)
    counts = np.bincount(seen, minlength=int(max(seen.max(), told.max())) + 1) + 1
    return float(-np.log2(counts / counts.sum())[told].mean())


def _no_change(train: Part, test: Part) -> float:
    return float(np.mean(test.targets**2))


def _persistence(train: Part, test: Part) -> float:
    return float(min(np.mean((guess - test.targets) ** 2) for guess in (test.x, train.targets.mean(axis=(0, 1)))))


_TRIVIAL = {"majority": _majority, "unigram": _unigram, "no change": _no_change, "persistence": _persistence}


# From data to sequences ---------------------------------------------------------------------------------------------


def _in_order(count: int, shares: tuple[float, float] = (0.8, 0.1)) -> tuple[Indices, Indices, Indices]:
    """The first sequences train, the next validate, the last test."""
    first, second, third = np.split(np.arange(count), np.cumsum([int(share * count) for share in shares]))
    return first, second, third


def _in_turns(count: int) -> tuple[Indices, Indices, Indices]:
    """Of every five sequences three train, one validates and one tests."""
    turn = np.arange(count) % 5
    return np.flatnonzero(turn < 3), np.flatnonzero(turn == 3), np.flatnonzero(turn == 4)


def _pad(sequences: Sequence[Iterable[int]]) -> tuple[Indices, Indices]:
    """Return numbers (T, N), −1 past the end, and lengths (N,)."""
    rows = [list(sequence) for sequence in sequences]
    return np.array([*zip_longest(*rows, fillvalue=-1)], np.int64), np.array([len(row) for row in rows])


def _one_hot(numbers: Indices, size: int) -> NDArray[np.float32]:
    """Return numbers (T, N) as (T, N, size), zero for −1."""
    return np.eye(size + 1, size, dtype=np.float32)[numbers]  # the row of −1 is zero


def _spelled(texts: Collection[str]) -> tuple[Indices, Indices, list[str]]:
    """Return texts as targets (T', N), each with an end symbol, their lengths, and the symbols."""
    symbols = [*sorted(set("".join(texts))), "\N{SYMBOL FOR END OF TEXT}"]
    numbers, lengths = _pad([[*map(symbols.index, text), len(symbols) - 1] for text in texts])
    return np.maximum(numbers, 0), lengths, symbols


def _next_symbol(numbers: Indices, lengths: Indices, split: tuple[Indices, ...], symbols: Sequence[str]) -> _Built:
    """Return sequences in which every symbol is to be predicted from those before it."""
    train, validation, test = split
    targets = np.maximum(numbers[1:], 0)
    x = _one_hot(np.where(numbers[1:] < 0, -1, numbers[:-1]), len(symbols))
    return _Built(x, targets, lengths - 1, (train, validation, test), symbols)


def _standardised(values: Array, train: int) -> Array:
    """Return values in standard deviations from the mean of the first `train` of them, column by column."""
    scaled: Array = (values - values[:train].mean(axis=0)) / values[:train].std(axis=0)
    return scaled


def _forecast(values: Array, steps: int, ends: tuple[int, int]) -> _Built:
    """Return windows of `steps` days and how the first column changes to the day after, split at the days `ends`."""
    day = np.arange(steps, len(values))
    train, validation, test = np.split(np.arange(len(day)), np.searchsorted(day, ends))
    x = np.stack([values[start : start + len(day)] for start in range(steps)])
    return _Built(x, np.diff(values[steps - 1 :, :1], axis=0), np.full(len(day), steps), (train, validation, test))


# The applications ---------------------------------------------------------------------------------------------------

#: Applications by name.
APPLICATIONS: dict[str, Application] = {}

_BITS = ("cross_entropy", "bits a symbol", "unigram")
_LABEL = ("many_to_one", "cross_entropy", "accuracy", "majority")
_FORECAST = ("many_to_one", "mse", "squared error", "no change")


def _application(
    use: str, origin: str, topology: str, loss: str, metric: str, trivial: str
) -> Callable[[Callable[..., _Built]], Callable[..., _Built]]:
    """Add the application that a function builds."""

    def add(build: Callable[..., _Built]) -> Callable[..., _Built]:
        name = build.__name__.removeprefix("_")
        APPLICATIONS[name] = Application(name, use, origin, topology, loss, metric, trivial, build)
        return build

    return add


_PRINTABLE = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"


@_application("language model and text generation: the next character", "manual", "many_to_many", *_BITS)
def _character_model(steps: int = 100) -> _Built:
    """Runs of spaces are one; 97 symbols (printable ASCII, line feed, any other); windows of 100 characters. The first
    80 % of the text train, the next 10 % validate, the last 10 % test."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    if len(text) < 300_000:
        raise ValueError(f"manual must hold the topics of Python's help(), got {len(text)} characters")
    text = re.sub(r" *\n\s*", "\n", re.sub(" +", " ", text))
    number = {symbol: k for k, symbol in enumerate(_PRINTABLE)}
    codes = np.array([number.get(symbol, len(_PRINTABLE) - 1) for symbol in text])
    count = (len(codes) - 1) // steps
    windows = np.stack([codes[k * steps : (k + 1) * steps + 1] for k in range(count)], axis=1)
    return _next_symbol(windows, np.full(count, steps + 1), _in_order(count), _PRINTABLE)


@_application("sentiment: is a word, spelled letter by letter, positive or negative?", "lexicon", *_LABEL)
def _sentiment() -> _Built:
    """Words of the letters a to z, by the sign of their mean rating. Of every five in alphabetical order three train,
    one validates, one tests: words of one stem fall into different parts."""
    rows = [line.split("\t") for line in shipped("lexicon").files[0].decode().splitlines()]
    rows = [row for row in rows if row[0].isascii() and row[0].isalpha() and row[0].islower()]
    numbers, lengths = _pad([[ord(letter) - ord("a") for letter in row[0]] for row in rows])
    positive = np.array([float(row[1]) > 0 for row in rows]).astype(np.int64)
    return _Built(_one_hot(numbers, 26), positive, lengths, _in_turns(len(rows)), ("negative", "positive"))


@_application("translation: an English message into French, letter by letter", "messages", "encoder_decoder", *_BITS)
def _translation(longest: int = 40) -> _Built:
    """Lower case, at most 40 characters, no placeholders; an end symbol. Of every five three train, one validates, one
    tests."""
    entry = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', re.MULTILINE)
    pairs: dict[str, str] = {}
    for file in shipped("messages").files:
        for english, french in entry.findall(file.decode()):
            source, target = ("".join(re.findall('"(.*)"', part)).lower() for part in (english, french))
            if (
                source
                and target
                and max(len(source), len(target)) <= longest
                and not set("%\\{") & set(source + target)
            ):
                pairs.setdefault(source, target)
    letters = sorted(set("".join(pairs)))
    numbers, lengths = _pad([map(letters.index, text) for text in pairs])
    targets, target_lengths, symbols = _spelled(pairs.values())
    return _Built(_one_hot(numbers, len(letters)), targets, lengths, _in_turns(len(pairs)), symbols, target_lengths)


@_application("weather: tomorrow's maximum temperature, less today's", "daily_weather", *_FORECAST)
def _weather(steps: int = 14) -> _Built:
    """14 days of maximum, minimum, precipitation and wind, standardised, and the season. 2012 and 2013 train, 2014
    validates, 2015 tests."""
    table = pd.read_csv(io.BytesIO(shipped("daily_weather").files[0]), parse_dates=["date"])
    season = 2 * np.pi * table["date"].dt.day_of_year.to_numpy(np.float64) / 365.25
    measured = table[["temp_max", "temp_min", "precipitation", "wind"]].to_numpy(np.float64)
    first, second = (int((table["date"].dt.year < year).sum()) for year in (2014, 2015))
    values = np.column_stack([_standardised(measured, first), np.sin(season), np.cos(season)])
    return _forecast(values, steps, (first, second))


@_application(
    "stocks: tomorrow's range between highest and lowest price, ln ln(high / low), less today's", "sp500", *_FORECAST
)
def _stocks(steps: int = 22) -> _Built:
    """22 days of the range and of the returns, standardised: the size of returns can be forecast, their sign cannot.
    The first 70 % of the days train, 15 % validate, 15 % test."""
    table = pd.read_csv(io.BytesIO(gzip.decompress(shipped("sp500").files[0])))
    high, low, close = np.log(table[["High", "Low", "Close"]].to_numpy(np.float64)).T
    values = np.column_stack([np.log(high - low)[1:], np.diff(close)])
    ends = (int(0.7 * len(values)), int(0.85 * len(values)))
    return _forecast(_standardised(values, ends[0]), steps, ends)


@_application("speech: which digit was spoken?", "spoken_digits", *_LABEL)
def _speech() -> _Built:
    """Coefficients standardised. In the package's order, which is shuffled, 2,000 train, 500 validate, 500 test: the
    six speakers are in all parts."""
    with np.load(io.BytesIO(shipped("spoken_digits").files[0])) as file:
        frames, labels, lengths = file["X"], file["y"], file["lengths"].astype(np.int64)
    split = _in_order(len(labels), (2 / 3, 1 / 6))
    ends = np.cumsum(lengths)
    frames = _standardised(frames.astype(np.float64), int(ends[split[0][-1]]))
    x = np.zeros((lengths.max(), len(lengths), frames.shape[1]))
    for n, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        x[:length, n] = frames[end - length : end]
    return _Built(x, labels.astype(np.int64), lengths, split, "0123456789")


@_application("music: the next note, rest or bar line of a tune", "tunes", "many_to_many", *_BITS)
def _music(longest: int = 200, kinds: int = 80) -> _Built:
    """The first tune of each number without ornaments, at most 200 events; the 79 commonest events of the
    training part and any other. In the book's order 80 % train, 10 % validate, 10 % test."""
    text = "\n".join(file.decode("latin-1") for file in shipped("tunes").files)
    tunes: dict[str, list[str]] = {}
    for tune in re.split(r"^X:", text, flags=re.MULTILINE)[1:]:
        number, _, rest = tune.partition("\n")
        body = "\n".join(line for line in rest.splitlines() if not re.match(r"\s*([A-Za-z]:|%)", line))
        body = re.sub(r'"[^"]*"|\{[^}]*\}|![^!]*!|%.*|\[[A-Z]:[^\]]*\]', "", body)
        tunes.setdefault(number.strip(), re.findall(r"[_^=]?[A-Ga-gz][,']*\d*/*\d*|\|+", body)[: longest + 1])
    events = [["|" if event[0] == "|" else event for event in tune] for tune in tunes.values() if len(tune) > 10]
    split = _in_order(len(events))
    common = Counter(event for n in split[0] for event in events[n]).most_common(kinds - 1)
    symbols = [*(event for event, _ in common), "other"]
    number_of = {event: k for k, event in enumerate(symbols)}
    numbers, lengths = _pad([[number_of.get(event, kinds - 1) for event in tune] for tune in events])
    return _next_symbol(numbers, lengths, split, symbols)


@_application("captions: the Unicode name of the picture of a letter", "glyphs", "one_to_many", *_BITS)
def _captions(side: int = 10, longest: int = 40) -> _Built:
    """Latin, Greek and Cyrillic letters at 10 × 10 pixels, names of at most 40 characters and an end symbol, the first
    of as many classes as there are pixels. Of every five three train, one validates, one tests."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    (file,) = shipped("glyphs").files
    names = {chr(code): unicodedata.name(chr(code), "") for code in sorted(FT2Font(io.BytesIO(file)).get_charmap())}
    chosen = {
        letter: name
        for letter, name in names.items()
        if unicodedata.category(letter)[0] == "L"
        and name.startswith(("LATIN", "GREEK", "CYRILLIC"))
        and len(name) <= longest
    }
    font, images = ImageFont.truetype(io.BytesIO(file), 40), []
    for letter in chosen:
        image = Image.new("L", (60, 60))
        ImageDraw.Draw(image).text((8, 42), letter, 255, font, anchor="ls")
        images.append(np.asarray(image.resize((side, side), Image.Resampling.BOX)).reshape(-1) / 255)
    targets, lengths, symbols = _spelled(chosen.values())
    return _Built(np.stack(images)[None], targets, None, _in_turns(len(chosen)), symbols, lengths)


@_application(
    "moving images: the next frame of a digit that bounces within the picture",
    "digit_images",
    "many_to_many",
    "mse",
    "squared error",
    "persistence",
)
def _moving_images(steps: int = 20, side: int = 12) -> _Built:
    """20 frames of 12 × 12 pixels, standardised; the digit moves by a pixel a step in both directions, from places
    drawn once from seed 0. In the data's order, by writers, two thirds train, a sixth validates, a sixth tests."""
    digits = digit_images()[0].reshape(-1, 8, 8) / 16
    count, room = len(digits), side - 8
    rng = np.random.default_rng(0)
    start, way = rng.integers(2 * room, size=(2, count)), rng.choice([-1, 1], (2, count))
    # A position that is reflected at both ends is a triangle wave of one that goes on.
    place = np.abs((start + way * np.arange(steps + 1)[:, None, None]) % (2 * room) - room)
    canvas, pixel, n = np.zeros((steps + 1, count, side, side)), np.arange(8), np.arange(count)[:, None, None]
    for t in range(steps + 1):
        canvas[t, n, place[t, 0][:, None, None] + pixel[:, None], place[t, 1][:, None, None] + pixel] = digits
    split = _in_order(count, (2 / 3, 1 / 6))
    seen = canvas[:, split[0]]
    frames = ((canvas - seen.mean()) / seen.std()).reshape(steps + 1, count, -1)
    return _Built(frames[:-1], frames[1:], np.full(count, steps), split)


@_application("digits read pixel by pixel: which one was it?", "digit_images", *_LABEL)
def _pixel_digits() -> _Built:
    """64 pixels, standardised. In the data's order, by writers, two thirds train, a sixth validates, a sixth tests."""
    images, labels = digit_images()
    split = _in_order(len(images), (2 / 3, 1 / 6))
    x = _standardised(images.reshape(-1, 1), 64 * len(split[0])).reshape(images.shape)
    return _Built(x.T[:, :, None], labels, np.full(len(x), 64), split, "0123456789")
