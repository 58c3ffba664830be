"""An invented catalogue of anime in the 24 columns of anime-dataset-2023.csv, with the same kinds of dirt.

    python data_prep/make_sample_anime.py --output data/raw-sample/anime.csv

No title, company or story in it exists. The dirt: UNKNOWN values, "No description available", numbers such as 12.0,
line breaks inside quotes, credits after a synopsis, a byte order mark, a title whose makers nobody knows; and one row
each that must be rejected: an anime_id twice, a name twice, a row that is cut off, a score that is no number. The same
seed gives the same bytes.
"""

import csv
import io
import random
from pathlib import Path

from preparing import Parser, command
from preparing.dataset_writer import closing_lock, refuse_existing_output

COLUMNS = [
    "anime_id",
    "Name",
    "English name",
    "Other name",
    "Score",
    "Genres",
    "Synopsis",
    "Type",
    "Episodes",
    "Aired",
    "Premiered",
    "Status",
    "Producers",
    "Licensors",
    "Studios",
    "Source",
    "Duration",
    "Rating",
    "Rank",
    "Popularity",
    "Favorites",
    "Scored By",
    "Members",
    "Image URL",
]
ADJECTIVES = [
    "Silver",
    "Crimson",
    "Hidden",
    "Gentle",
    "Broken",
    "Winter",
    "Paper",
    "Hollow",
    "Golden",
    "Distant",
    "Quiet",
    "Electric",
]
NOUNS = [
    "Harbor",
    "Lantern",
    "Garden",
    "Orbit",
    "Kitchen",
    "Dragon",
    "Violin",
    "Signal",
    "Library",
    "Comet",
    "Bakery",
    "Tram",
]
ENDINGS = ("Chronicle", "no Uta", "Club", "Academy", "Days", "2nd Season")
ROMAJI = ["ka", "mi", "ko", "na", "ru", "shi", "to", "mo", "ya", "ri", "se", "ha"]
KANA = dict(zip(ROMAJI, "カミコナルシトモヤリセハ", strict=True))
GENRES = ["Action", "Adventure", "Comedy", "Drama", "Fantasy", "Mystery", "Romance", "Sci-Fi", "Sports", "Supernatural"]
STUDIOS = ("Studio Tanuki", "Aoi Works", "Nine Cranes", "J.K.Frame", "Production Fuji-O", "Mokuren")
PRODUCERS = ("Harbor TV", "Kumo Music", "Red Bean Pictures", "Satellite One", "Yoru Publishing")
RATINGS = ("G - All Ages", "PG - Children", "PG-13 - Teens 13 or older", "R - 17+ (violence & profanity)")
HEROES = ["a tram driver", "two sisters", "a retired thief", "the youngest cook", "a lonely robot", "the chess club"]
DEEDS = ["finds a door that was never there", "must win one last match", "hears a song from the future"]
PLACES = ["in a town without clocks", "on the night train", "under the old lighthouse", "at the edge of space"]


def main(output: Path, num_titles: int, seed: int) -> None:
    """Write a table of `num_titles` invented titles. Raises ValueError where `output` exists."""
    refuse_existing_output(output)
    rows = draw_rows(num_titles, random.Random(seed))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.unfinished")
    with closing_lock(output):
        unfinished.write_bytes(text.getvalue().encode("utf-8-sig"))
        unfinished.replace(output)
    print(f"{output}: {num_titles} titles and {len(rows) - num_titles} rows that must be rejected")


def draw_rows(num_titles: int, chooser: random.Random) -> list[list[str]]:
    """The titles, in order of anime_id, followed by four spoilt rows. Names are unique."""
    english = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    if num_titles > len(english):
        raise ValueError(f"--titles {num_titles}: there are only {len(english)} invented names")
    chooser.shuffle(english)
    names: set[str] = set()
    rows = []
    for anime_id, english_name in enumerate(english[:num_titles], start=1):
        while True:
            syllables = [chooser.choice(ROMAJI) for _ in range(4)]
            name = f"{''.join(syllables).capitalize()} {chooser.choice(ENDINGS)}"
            if name not in names:
                break
        names.add(name)
        rows.append(draw_row(anime_id, name, english_name, "".join(KANA[s] for s in syllables), chooser))
    for column in ("Producers", "Studios", "Episodes"):
        rows[-1][COLUMNS.index(column)] = "UNKNOWN"
    id_twice, name_twice, cut_off, bad_score = (list(chooser.choice(rows)) for _ in range(4))
    id_twice[1], id_twice[2] = "Nido no Id", "UNKNOWN"
    name_twice[0] = str(num_titles + 1)
    cut_off[0], cut_off[1:] = str(num_titles + 2), ["Kireta Gyou", "UNKNOWN"]
    bad_score[0], bad_score[1], bad_score[4] = str(num_titles + 3), "Warui Tensuu", "great"
    return [*rows, id_twice, name_twice, cut_off, bad_score]


def draw_row(anime_id: int, name: str, english_name: str, other_name: str, chooser: random.Random) -> list[str]:
    """One row of the table, with values missing as often as in the real one."""

    def maybe(value: str, chance_known: float) -> str:
        return value if chooser.random() < chance_known else "UNKNOWN"

    def some_of(names: tuple[str, ...] | list[str], most: int) -> str:
        return ", ".join(sorted(chooser.sample(names, chooser.randint(1, most))))

    hero = chooser.choice(HEROES)
    story = f"{hero[0].upper()}{hero[1:]} {chooser.choice(DEEDS)} {chooser.choice(PLACES)}."
    if chooser.random() < 0.3:
        story += f"\n\nNothing stays as it was.\n\n{chooser.choice(['(Source: ANN)', '[Written by MAL Rewrite]'])}"
    is_series = chooser.random() < 0.7
    year = chooser.randint(1995, 2022)
    number_of_raters = chooser.randint(1, 900_000)
    return [
        str(anime_id),
        name,
        maybe(english_name, 0.75),
        other_name,
        maybe(f"{chooser.uniform(5, 9):.2f}", 0.9),
        maybe(some_of(GENRES, 3), 0.95),
        story if chooser.random() < 0.85 else "No description available for this anime.",
        "TV" if is_series else "Movie",
        maybe(f"{chooser.choice((12, 13, 24, 26, 52)) if is_series else 1}.0", 0.95),
        f"Apr 3, {year}",
        f"spring {year}" if is_series else "UNKNOWN",
        "Finished Airing",
        maybe(some_of(PRODUCERS, 2), 0.8),
        "UNKNOWN",
        maybe(chooser.choice(STUDIOS), 0.9),
        chooser.choice(("Manga", "Original", "Unknown")),
        "24 min per ep" if is_series else "1 hr 40 min",
        maybe(chooser.choice(RATINGS), 0.95),
        f"{anime_id * 7}.0",
        str(anime_id * 3),
        str(chooser.randint(0, 5_000)),
        maybe(f"{number_of_raters}.0", 0.95),
        str(number_of_raters * 2),
        "https://example.com/none.jpg",
    ]


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the CSV file; must not exist yet")
    parser.add_argument("--titles", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command.run(lambda: main(arguments.output, arguments.titles, arguments.seed))
