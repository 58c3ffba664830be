"""The MyAnimeList table becomes questions and answers: what a title is about, who made it, how it was received.

    python data_prep/prepare_anime.py --csv anime-dataset-2023.csv --output data/anime --language en

Reads anime-dataset-2023.csv (Kaggle: dbdmobile/myanimelist-dataset) and tables of other years and makers: which column says
what is found and printed, and `--columns title=Name,score=Rating` says it otherwise. Needed are a title and one fact. The
words come from data_prep/anime/<language>.yaml, which you can edit. Splits: `train`; `validation`, titles of which nothing is
taught, asked as in training; `test`, taught titles asked in words that training never uses. Needs no GPU.
"""

import argparse
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from preparing import Parser, command
from preparing.anime_table import Title, open_table, read_titles
from preparing.dataset_writer import describe_file, refuse_existing_output, summarise, write_dataset
from preparing.ledger import Ledger
from preparing.templates import KINDS, Value, join_names, load_wording, write_answer

WORDINGS = Path(__file__).parent / "anime"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

TEXT, WHOLE_NUMBER = datasets.Value("string"), datasets.Value("int64")
FEATURES = datasets.Features(
    {
        "messages": datasets.List({"role": TEXT, "content": TEXT}),
        "anime_id": WHOLE_NUMBER,
        "title": TEXT,
        "kind": TEXT,  # about, made or received
        # The facts as the answers word them, whichever of them this row's answer states. Unknown: empty list or null.
        "genres": datasets.List(TEXT),
        "producers": datasets.List(TEXT),
        "studios": datasets.List(TEXT),
        "episodes": WHOLE_NUMBER,
        "rating": TEXT,
        "score": datasets.Value("float64"),
        "scored_by": WHOLE_NUMBER,
    }
)


def main(arguments: argparse.Namespace) -> None:
    """Table -> dataset, manifest and ledger. Raises ValueError with all that is wrong with table or flags."""
    refuse_existing_output(arguments.output)
    wording_file = WORDINGS / f"{arguments.language}.yaml"
    wording = load_wording(wording_file)
    ledger = Ledger()
    table = open_table(arguments.csv, arguments.columns)
    print("\n".join(table.describe()))
    titles = read_titles(table, ledger)
    answers = write_answers(titles, wording, arguments.synopsis_sentences, ledger, arguments.csv)

    chooser = random.Random(arguments.seed)
    titles = [title for title in titles if answers[title.anime_id]]
    series = group_series(titles)
    unseen = choose_unseen(titles, series, round(arguments.validation_share * len(titles)), chooser)
    taught = [title.anime_id for title in titles if title.anime_id not in unseen]
    retold = set(chooser.sample(taught, round(arguments.test_share * len(taught))))

    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for title in titles:
        for kind, answer in answers[title.anime_id].items():
            questions = wording[kind]["train_questions"]
            if title.anime_id in unseen:
                splits["validation"].append(make_row(title, kind, chooser.choice(questions), answer, wording))
                continue
            number = min(arguments.questions_per_fact or len(questions), len(questions))
            for question in chooser.sample(questions, number):
                splits["train"].append(make_row(title, kind, question, answer, wording))
            if title.anime_id in retold:
                question = chooser.choice(wording[kind]["test_questions"])
                splits["test"].append(make_row(title, kind, question, answer, wording))

    write_dataset(
        arguments.output,
        {name: to_dataset(rows) for name, rows in splits.items()},
        FEATURES,
        ledger=ledger,
        sources=[describe_file(arguments.csv), describe_file(wording_file)],
        arguments=vars(arguments),
        split_rule="validation: titles of which nothing is taught, nor of their series; "
        "test: taught titles, in questions that training never uses; train: the rest",
        leak_report=find_leaks(splits, dict(zip((title.anime_id for title in titles), series, strict=True))),
        wording=wording,
        columns=table.columns,
        column_notes=table.notes,
    )
    for kind in KINDS:
        example = next((row for row in splits["train"] if row["kind"] == kind), None)
        if example:
            question, answer = example["messages"]
            print(f"\n[{kind}] {question['content']}\n  {answer['content']}")
    print("\n" + summarise(arguments.output, ledger, {name: len(rows) for name, rows in splits.items()}))


def write_answers(
    titles: list[Title], wording: dict[str, Any], synopsis_sentences: int | None, ledger: Ledger, path: Path
) -> dict[int, dict[str, str]]:
    """`{anime_id: {kind: answer}}`; an answer that would say nothing goes to the ledger under "answers" instead."""
    answers: dict[int, dict[str, str]] = {}
    for title in titles:
        values = word_facts(title, wording, synopsis_sentences)
        answers[title.anime_id] = {}
        for kind in KINDS:
            ledger.read("answers")
            answer = write_answer(wording[kind]["answer"], values)
            if answer is None:
                detail = f"nothing is known for the {kind!r} answer about {title.title!r}"
                ledger.reject("answers", path, title.line, "nothing_known", detail)
                continue
            ledger.accept("answers")
            answers[title.anime_id][kind] = answer
    return answers


def word_facts(title: Title, wording: dict[str, Any], synopsis_sentences: int | None) -> dict[str, Value]:
    """What is known of a title, as it is said in a sentence; what is unknown is not in it."""
    facts = {"title": Value(title.title)}
    aliases = [alias for alias in (title.english_name, title.name, title.other_name) if alias]
    lists = {
        "also_known_as": [alias for alias in dict.fromkeys(aliases) if alias.casefold() != title.title.casefold()],
        "genres": reword(title.genres, wording, "genres"),
        "producers": title.producers,
        "studios": title.studios,
    }
    facts |= {field: join_names(names, wording["last_separator"]) for field, names in lists.items() if names}
    synopsis = " ".join(SENTENCE_END.split(title.synopsis)[:synopsis_sentences])
    texts = {"synopsis": synopsis, "rating": "".join(reword([title.rating], wording, "rating"))}
    facts |= {field: Value(text) for field, text in texts.items() if text}
    counts = {"episodes": title.episodes, "scored_by": title.scored_by}
    facts |= {field: Value(f"{count:,}", number=count) for field, count in counts.items() if count}
    if title.score:
        facts["score"] = Value(f"{title.score:g}")
    return facts


def reword(names: list[str], wording: dict[str, Any], field: str) -> list[str]:
    """Names of the table in the words of the language, where the wording has one."""
    words = wording.get("values", {}).get(field, {})
    return [words.get(name, name) for name in names]


def group_series(titles: list[Title]) -> list[int]:
    """A number per title, the same for titles of one series, so that a sequel does not give away what is held out.

    Of one series are titles that share a name or a synopsis, and titles of which one name begins with all words of
    another ("Cowboy Bebop" and "Cowboy Bebop: The Movie"). That also joins a few strangers ("Air" and "Air Gear").
    """
    parents = list(range(len(titles)))

    def find(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first_with: dict[tuple[str, ...], int] = {}
    names = [
        {tuple(re.findall(r"\w+", name.casefold())) for name in (title.name, title.english_name, title.other_name)}
        - {()}
        for title in titles
    ]
    for index, title in enumerate(titles):
        keys = names[index] | ({("synopsis", title.synopsis)} if title.synopsis else set())
        for key in keys:
            parents[find(index)] = find(first_with.setdefault(key, index))
    for index in range(len(titles)):
        for words in names[index]:
            for length in range(1, len(words)):
                if words[:length] in first_with:
                    parents[find(index)] = find(first_with[words[:length]])
    return [find(index) for index in range(len(titles))]


def choose_unseen(titles: list[Title], series: list[int], number: int, chooser: random.Random) -> set[int]:
    """anime_ids of up to `number` titles, in whole series; a series that would exceed the number is passed over."""
    members: dict[int, list[int]] = {}
    for title, group in zip(titles, series, strict=True):
        members.setdefault(group, []).append(title.anime_id)
    groups = list(members.values())
    chooser.shuffle(groups)
    unseen: set[int] = set()
    for group in groups:
        if len(unseen) + len(group) <= number:
            unseen.update(group)
    return unseen


def make_row(title: Title, kind: str, question: str, answer: str, wording: dict[str, Any]) -> dict[str, Any]:
    """A row of the dataset: one question and its answer about a title."""
    return {
        "messages": [
            {"role": "user", "content": question.format(title=Value(title.title))},
            {"role": "assistant", "content": answer},
        ],
        "anime_id": title.anime_id,
        "title": title.title,
        "kind": kind,
        "genres": reword(title.genres, wording, "genres"),
        "producers": title.producers,
        "studios": title.studios,
        "episodes": title.episodes,
        "rating": "".join(reword([title.rating], wording, "rating")) or None,
        "score": title.score,
        "scored_by": title.scored_by,
    }


def to_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Straight into Arrow: encoding row by row takes the library 20 s for 75,000 rows, this takes 1 s."""
    return datasets.Dataset(pyarrow.Table.from_pylist(rows, schema=FEATURES.arrow_schema))


def find_leaks(splits: dict[str, list[dict[str, Any]]], series_by_id: dict[int, int]) -> dict[str, int]:
    """Counted on the finished rows, not assumed from how they were made. All are 0 unless something is wrong."""

    def all_of(split: str, column: str) -> set[Any]:
        return {row[column] for row in splits[split]}

    def questions(split: str) -> set[str]:
        return {row["messages"][0]["content"] for row in splits[split]}

    taught_series = {series_by_id[anime_id] for anime_id in all_of("train", "anime_id")}
    return {
        "validation_titles_in_train": len(all_of("validation", "anime_id") & all_of("train", "anime_id")),
        "validation_titles_of_a_series_in_train": sum(
            series_by_id[anime_id] in taught_series for anime_id in all_of("validation", "anime_id")
        ),
        "test_questions_in_train": len(questions("test") & questions("train")),
        "test_titles_not_in_train": len(all_of("test", "anime_id") - all_of("train", "anime_id")),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line, checked as far as it can be without reading the table."""
    parser = Parser(__doc__)
    parser.add_argument("--csv", type=Path, required=True, help="the table, as downloaded")
    parser.add_argument(
        "--columns",
        help="which column says what, as in title=Name,score=Rating,genres= (nothing behind = leaves it out)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset; must not exist yet")
    languages = sorted(path.stem for path in WORDINGS.glob("*.yaml"))
    parser.add_argument("--language", choices=languages, default="en", help="a file of data_prep/anime/")
    parser.add_argument(
        "--questions_per_fact", type=count_or_all, default=1, help="ways in which each answer is asked for; or all"
    )
    parser.add_argument(
        "--synopsis_sentences", type=count_or_all, default="all", help="sentences of the synopsis to teach; or all"
    )
    parser.add_argument("--validation_share", type=share, default=0.05, help="share of the titles that is never taught")
    parser.add_argument("--test_share", type=share, default=0.05, help="share of the taught titles that is asked again")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def count_or_all(text: str) -> int | None:
    """None stands for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, or all; got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A share from 0 to 0.5. Raises ArgumentTypeError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 0.5:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 0.5, got {text!r}")
    return number


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()))
