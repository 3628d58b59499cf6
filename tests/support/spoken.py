"""Small tokenizers as decoders and encoder-decoders have them, and chat templates in the manner of real ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The capital of France is Paris. Answer: yes, no or perhaps? user assistant system model tool",
    "Question: What is 2 + 2? It is 4. Hello there, how are you? You are a helpful assistant.",
] * 4
END, START = "<|im_end|>", "<|im_start|>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Turns end with an end token, and a newline follows. It says itself which tokens are an assistant's."""
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
) + CHATML
"""As SmolLM2's and Qwen2.5's: a system prompt where there is none."""
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|sep|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>\n\n{% endif %}"
)
"""As Llama 3's: nothing follows the end of a turn, and content is trimmed."""
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles\nare supported!') }}{% endif %}{% endfor %}"
)
"""As Mistral's: no prompt for a generation; other roles are refused."""
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the thoughts of earlier turns are left out."""
SLY = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}")
"""As DeepSeek-R1's: answers are to begin with thoughts that no conversation has."""


def byte_level(template: str | None = None, end: str | None = END, *, begin: bool = False) -> PreTrainedTokenizerFast:
    """Pieces of bytes that hold the blank before a word, as GPT-2's and Llama 3's.

    Args:
        begin: <|begin|> is put before each text.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", START, END, "<|sep|>", "<|other|>"]
    quiet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=360, special_tokens=special, **quiet))
    if begin:
        backend.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token=end)
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def sentence_pieces(template: str | None = None) -> PreTrainedTokenizerFast:
    """Pieces with a mark for blanks, one put before the text, <s> before all; unknown bytes are tokens: as Llama 2."""
    letters = sorted({letter for text in TEXT for letter in text.replace(" ", "▁")} | set("[]/INST"))
    special = ["<unk>", "<s>", "</s>"]
    merges = ["▁ P", "▁ y", "▁ i", "a r", "i s", "P ar", "▁P ar", "Par is", "▁Par is", "▁ A", "e s", "▁y es", "y es"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(m.replace(" ", "") for m in merges)]
    vocabulary = {piece: row for row, piece in enumerate(dict.fromkeys(pieces))}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    made.chat_template = template
    return made


def with_end(template: str | None = None) -> PreTrainedTokenizerFast:
    """Words by themselves, </s> put behind a text: as T5's, but for the pieces."""
    words = sorted({word for text in TEXT for word in text.replace("?", " ?").replace(".", " .").split()})
    vocabulary = {word: row for row, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made
