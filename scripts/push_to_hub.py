"""Upload a run, a merged model or a dataset to the Hugging Face Hub: private, and only what belongs to it.

    python scripts/push_to_hub.py outputs/llava-qlora --repo_id NAME/llava-people --dry_run
    python scripts/push_to_hub.py models/llava-merged --repo_id NAME/llava-people-merged
    python scripts/push_to_hub.py data/cctv --repo_id NAME/cctv

Says what it will upload, and what it leaves out. Of a run that is weights, processor, arguments and card: no checkpoints,
no trackers, no pages with pictures. A dataset becomes Parquet files, pictures included, which training opens by the
repository's name. The token is HF_TOKEN, or that of `hf auth login`. Stopped half way, the same command goes on: files that
are there already are not sent again.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from finetuning import command
from finetuning.flags import Parser, nearest_path
from finetuning.manifest import MANIFEST, described_files, files_in, manifest_problems
from finetuning.run_folder import ARGUMENTS, BOOKKEEPING, CARD, METRICS, files_of_result, open_run

DATASET_FILES = ("dataset_dict.json", "dataset_info.json")
LARGEST_FILE = 500_000_000  # bytes of rows in a Parquet file


def kind_of(folder: Path) -> str:
    """`dataset`, `run` or `model`. Raises ValueError for anything else, and for what is damaged or not complete."""
    if any((folder / name).is_file() for name in DATASET_FILES):
        kind = "dataset"
    elif (folder / ARGUMENTS).is_file() or (folder / METRICS).is_file():
        open_run(str(folder))
        kind = "run"
    elif (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        kind = "model"
    else:
        raise ValueError(
            f"{folder}: neither a run (outputs/...), nor a merged model, nor a prepared dataset{nearest_path(folder)}"
        )
    if described_files(folder) is not None and (problems := manifest_problems(folder)):
        raise ValueError(f"{folder}: not as it was written: {'; '.join(problems)}")
    return kind


def files_to_upload(folder: Path, kind: str) -> list[Path]:
    """The files of a run or a model that go to the Hub."""
    if kind == "model":
        return sorted({*files_in(folder), *folder.glob(MANIFEST)})
    kept = [path for path in files_of_result(folder) if path.name not in BOOKKEEPING]
    return sorted({*kept, *(path for path in (folder / CARD, folder / METRICS) if path.is_file())})


def main(options: argparse.Namespace) -> None:
    """Upload the folder, or list what would be uploaded (--dry_run). Raises ValueError where it cannot be."""
    kind = kind_of(options.folder)
    files = sorted(files_in(options.folder)) if kind == "dataset" else files_to_upload(options.folder, kind)
    total = sum(path.stat().st_size for path in files)
    whose = "everybody can read it" if options.public else "private"
    print(f"{options.folder} ({kind}) -> {options.repo_id}, {whose}: {len(files)} files, {total / 1e6:,.1f} MB")
    for path in files:
        print(f"  {path.stat().st_size:>14,}  {path.relative_to(options.folder)}")
    if options.dry_run:
        return

    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise ValueError("no token: set HF_TOKEN in the environment, or log in once with hf auth login")
    api, repo_type = HfApi(), "dataset" if kind == "dataset" else "model"
    try:
        url = api.create_repo(options.repo_id, repo_type=repo_type, private=not options.public, exist_ok=True)
        is_private = api.repo_info(url.repo_id, repo_type=repo_type).private
        if not options.public and not is_private:
            raise ValueError(f"{url} is there already, and public: add --public, or choose another --repo_id")
        with tempfile.TemporaryDirectory() as parquet:
            folder = options.folder
            if kind == "dataset":
                folder = Path(parquet) / "dataset"
                write_parquet(options.folder, folder)
                files = [path for path in folder.rglob("*") if path.is_file()]
            api.upload_folder(
                repo_id=url.repo_id,
                repo_type=repo_type,
                folder_path=folder,
                allow_patterns=[path.relative_to(folder).as_posix() for path in files],
                commit_message=f"{options.folder.name}: {kind}",
            )
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # the last of a file that broke off
        reasons = [str(part).strip().splitlines()[0].rstrip(".") for part in (error, error.__cause__) if part]
        reason = ": ".join(dict.fromkeys(reasons))
        raise ValueError(f"{options.repo_id}: {reason}. What was uploaded stays; the same command goes on") from error
    print(f"Uploaded: {url}")


def write_parquet(folder: Path, target: Path) -> None:
    """The splits of a prepared dataset as `data/<split>-<n>-of-<m>.parquet`, pictures in them, and its manifest.

    The same dataset gives the same bytes: what is at the Hub already is not sent again.
    """
    from datasets import load_from_disk
    from datasets.table import embed_table_storage
    from tqdm import tqdm

    from finetuning.data.picture_table import size_of_pictures, with_bytes, with_stored_pictures

    (target / "data").mkdir(parents=True)
    shards = []
    for split, rows in load_from_disk(str(folder)).items():
        rows = with_stored_pictures(rows, folder) if "images" in rows.column_names else rows
        number = max(-(-((rows.data.nbytes or 0) + size_of_pictures(rows)) // LARGEST_FILE), 1)
        shards += [(rows, f"{split}-{n:05}-of-{number:05}.parquet", n, number) for n in range(number)]
    for rows, name, n, number in tqdm(shards, desc="Writing Parquet", unit="file"):
        shard = with_bytes(rows.shard(number, n, contiguous=True)).with_format("arrow")
        shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
        shard.with_format(None).to_parquet(target / "data" / name)
    if (folder / "manifest.json").is_file():
        shutil.copyfile(folder / "manifest.json", target / "manifest.json")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="outputs/<run>, a merged model or a prepared dataset")
    parser.add_argument("--repo_id", required=True, metavar="NAME/REPOSITORY", help="where it goes")
    parser.add_argument("--public", action="store_true", help="everybody can read it")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, and end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_arguments()))
