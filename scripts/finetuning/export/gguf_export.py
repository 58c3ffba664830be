"""A merged model as GGUF files, and the proof: llama.cpp asked the same as the merged model."""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.data.dataset import open_dataset, open_split
from finetuning.export.gguf_files import stage, write_mmproj
from finetuning.export.llama_cpp import Answer, LlamaCpp, ask, convert, quantise, serving
from finetuning.families import is_vision
from finetuning.folder_lock import one_at_a_time
from finetuning.inference.generation import generate_greedily
from finetuning.manifest import made_whole
from finetuning.models.loading import load_for_inference
from finetuning.models.processing import load_config
from finetuning.run_folder import write_json
from finetuning.tasks.exam import Exam, make_exam

# Smallest share of equal answers of the fp16 file. Another engine rounds otherwise, so near ties may fall otherwise.
LEAST_EQUAL = 0.96
SMALLEST_LOG = -87.3  # of a normal fp32 number; a server says -3.4e38 of what is less likely
ROOM = 256  # tokens of context beside prompt and answer


@dataclass(frozen=True)
class Reference:
    """The merged model's greedy answer: text, its token ids, log-probabilities (tokens, vocabulary) at each of them."""

    text: str
    prompt_tokens: int
    tokens: list[int]
    log_probabilities: torch.Tensor


@torch.no_grad()
def reference_answers(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    max_new_tokens: int,
) -> list[Reference]:
    """The merged model's answer to each row, by transformers' `generate`."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    references = []
    for row in tqdm(rows, desc="Asking the merged model", unit="question"):
        output, length = generate_greedily(
            model,
            processing_class,
            [row],
            max_new_tokens=max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, length:].tolist()
        logits = torch.cat(output.logits).double().log_softmax(-1).cpu()
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        references.append(Reference(text, length, tokens, logits))
    return references


def divergence(reference: torch.Tensor, given: dict[int, float]) -> float:
    """KL(reference || given) in nats over the tokens that `given` names and all others as one: a lower bound."""
    tokens = list(given)
    ours = reference[tokens]
    theirs = torch.tensor(list(given.values()), dtype=torch.float64).clamp(min=SMALLEST_LOG)
    rest = [(1 - part.exp().sum()).clamp(min=1e-12).log() for part in (ours, theirs)]
    kl = (ours.exp() * (ours - theirs)).sum() + rest[0].exp() * (rest[0] - rest[1])
    return max(kl.item(), 0.0)


def compare(references: Sequence[Reference], answers: Sequence[Answer]) -> dict[str, Any]:
    """How an engine's answers differ from the merged model's.

    `equal_answers`, and along each answer as far as both went the same way: `mean_kl` (nats a token), `largest_kl`, and
    `largest_difference` of the log-probability of the merged model's own token. `equal_prompt_lengths` counts rows whose
    prompts have as many tokens.
    """
    divergences, differences = [], []
    for reference, answer in zip(references, answers, strict=True):
        for token, row, step in zip(reference.tokens, reference.log_probabilities, answer.steps, strict=False):
            divergences.append(divergence(row, step.log_probabilities))
            if token in step.log_probabilities:
                differences.append(abs(row[token].item() - step.log_probabilities[token]))
            if token != step.token:
                break
    pairs = list(zip(references, answers, strict=True))
    return {
        "questions": len(pairs),
        "equal_answers": sum(reference.text == answer.text for reference, answer in pairs),
        "equal_prompt_lengths": sum(reference.prompt_tokens == answer.prompt_tokens for reference, answer in pairs),
        "tokens_compared": len(divergences),
        "mean_kl": sum(divergences) / max(len(divergences), 1),
        "largest_kl": max(divergences, default=0.0),
        "largest_difference": max(differences, default=0.0),
    }


def open_exam(dataset_name: str, split: str, number: int, *, vision: bool) -> Exam:
    """At most `number` questions of a split that can be scored, evenly spread. Raises ValueError where there are none."""
    dataset = open_dataset(dataset_name, vision=vision)
    train = open_split(dataset, "train", dataset_name) if "train" in dataset else None
    exam = make_exam(open_split(dataset, split, dataset_name), train, limit=number)
    if not exam.facts:
        raise ValueError(f"{dataset_name}, split {split}: {exam.describe_refused()}, so there is nothing to ask")
    return exam


def scores_of(exam: Exam, answers: Sequence[str]) -> dict[str, float]:
    """The first number of each task in the exam, such as `count_mae`, of these answers."""
    metrics, _ = exam.score(answers)
    return {key: metrics[key] for key in exam.headlines if key in metrics}


def check_proof(report: dict[str, Any]) -> None:
    """Raise ValueError where llama.cpp's fp16 answers are too often others than the merged model's."""
    found = report["files"]["f16"]
    if found["equal_answers"] < LEAST_EQUAL * found["questions"]:
        raise ValueError(
            f"the export is not proven: {found['equal_answers']} of {found['questions']} answers of the f16 file equal the "
            f"merged model's, at least {LEAST_EQUAL:.0%} must ({found['mean_kl']:.2e} nats a token apart; "
            f"{found['equal_prompt_lengths']} prompts have as many tokens)"
        )


def export(
    model_folder: Path,
    output: Path,
    llama_cpp: LlamaCpp,
    *,
    dataset_name: str,
    split: str,
    questions: int,
    kinds: Sequence[str],
    max_new_tokens: int,
) -> dict[str, Any]:
    """GGUF files of a merged model in `output`, with `export_report.json`; the report.

    `kinds` are types of llama-quantize beside f16. Raises ValueError where a step fails or the files are not proven:
    nothing is left behind then.
    """
    config = load_config(str(model_folder), "main")
    vision = is_vision(config)
    exam = open_exam(dataset_name, split, questions, vision=vision)
    with one_at_a_time(output, "an export"), made_whole(output) as unfinished:
        # Files
        staged, files = unfinished / "staged", {"f16": unfinished / "model-f16.gguf"}
        stage(model_folder, staged)
        convert(llama_cpp, staged, files["f16"])
        for kind in tqdm(kinds, desc="Quantising", unit="file"):
            files[kind] = unfinished / f"model-{kind}.gguf"
            quantise(llama_cpp, files["f16"], files[kind], kind)
        model, processing_class = load_for_inference(str(model_folder))
        mmproj = unfinished / "mmproj-f16.gguf" if vision else None
        if mmproj is not None:
            write_mmproj(model_folder, model.config, processing_class, mmproj)

        # Proof: the merged model, then each file by llama.cpp itself
        references = reference_answers(model, processing_class, exam.questions, max_new_tokens)
        report = {
            "model": str(model_folder),
            "llama_cpp": llama_cpp.version,
            "merged_model": {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type},
            "dataset": dataset_name,
            "split": split,
            "least_equal": LEAST_EQUAL,
        }
        report["merged_model"]["scores"] = scores_of(exam, [reference.text for reference in references])
        del model
        gc.collect()
        context = max(reference.prompt_tokens for reference in references) + max_new_tokens + ROOM
        answers = {}
        for kind, file in files.items():
            with serving(llama_cpp, file, mmproj, context, unfinished / "server.log") as client:
                answers[kind] = ask(client, exam.questions, max_new_tokens, f"Asking {file.name}")
        report["files"] = {
            kind: {
                "file": file.name,
                "size": file.stat().st_size,
                **compare(references, answers[kind]),
                "scores": scores_of(exam, [answer.text for answer in answers[kind]]),
            }
            for kind, file in files.items()
        }
        check_proof(report)
        report["answers"] = [
            {"question": fact["question"], "reference": fact["reference"], "merged": reference.text}
            | {kind: answers[kind][place].text for kind in files}
            for place, (fact, reference) in enumerate(zip(exam.facts, references, strict=True))
        ]
        shutil.rmtree(staged)
        (unfinished / "server.log").unlink()
        write_json(unfinished / "export_report.json", report)
    return report
