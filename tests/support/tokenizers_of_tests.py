"""Small tokenizers that cut numbers in other ways than Llama's."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '</s>' if m['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Numbers of two digits are one token, longer ones several."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits(individual_digits=False)]
    )
    tokenizer.decoder = decoders.Fuse()
    text = [f"assistant: {number} people." for number in range(100) for _ in range(3)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*text, "user: How many people are in view?", "There are", "명입니다."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )
