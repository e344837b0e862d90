"""How each family of models writes a conversation: data only."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ChatForm:
    """How a family of models writes a conversation. `tokens` are the special tokens of the other strings."""

    tokens: tuple[str, ...]
    bos: str  # before everything
    system: tuple[str, str] | None  # None: the family has no system role and never gets a system prompt
    default_system: str | None  # where none is given; None: an empty system prompt has no system turn
    user: tuple[str, str]
    answer: tuple[str, str, str]  # header, end (learnt), what follows the end
    pretrain: tuple[str, str]  # around a plain text
    stops: tuple[str, ...]  # tokens that end a response
    between: str = ""  # before every user turn but the first
    final: str = ""  # after everything, learnt
    strip: bool = False  # whether messages lose white space at both ends
    system_in_user: bool = False  # whether the system turn stands inside the first user turn, after its opening
    reference_start: str | None = None  # what the reference searches for; None: it has no such family


_PLAIN = ChatForm(
    tokens=("{bos}", "{eos}"),
    bos="{bos}",
    system=("", "\n"),
    default_system=None,
    user=("", ""),
    answer=("\n", "{eos}", ""),
    between="\n",
    pretrain=("{bos}", "{eos}"),
    stops=(),
)

# Its models were tuned with a sentence of their authors before the first question: two published forms begin with it,
# in words that differ; here `data.system_prompt` can be that.
_VICUNA = ChatForm(
    tokens=("<s>", "</s>"),
    bos="<s>",
    system=("", " "),
    default_system=None,
    user=("USER: ", " ASSISTANT:"),
    answer=(" ", "</s>", ""),
    pretrain=("<s>", "</s>"),
    stops=("</s>",),
)
_BEGINNING = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)

CHAT_FORMS: dict[str, ChatForm] = {
    "llama3": ChatForm(
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        default_system=None,
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        answer=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
        pretrain=("<|begin_of_text|>", "<|eot_id|>"),
        stops=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        strip=True,
        reference_start="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen2": ChatForm(
        tokens=("<|im_start|>", "<|im_end|>"),
        bos="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        default_system="You are a helpful assistant.",
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        answer=("<|im_start|>assistant\n", "<|im_end|>", "\n"),
        pretrain=("<|im_start|>", "<|im_end|>"),
        stops=("<|im_end|>", "<|endoftext|>"),
        reference_start="<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma2": ChatForm(
        tokens=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        system=None,
        default_system=None,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        answer=("<start_of_turn>model\n", "<end_of_turn>", "\n"),
        pretrain=("<bos>", "<eos>"),
        stops=("<end_of_turn>", "<eos>"),
        final="<eos>",
        reference_start="<end_of_turn>\n<start_of_turn>model\n",
    ),
    # As Gemma 2's, with the system prompt at the start of the first question.
    "gemma3": ChatForm(
        tokens=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        system=("", "\n\n"),
        system_in_user=True,
        default_system=None,
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        answer=("<start_of_turn>model\n", "<end_of_turn>", "\n"),
        pretrain=("<bos>", "<eos>"),
        stops=("<end_of_turn>", "<eos>"),
        strip=True,
    ),
    "mistral": ChatForm(
        tokens=("<s>", "</s>"),
        bos="<s>",
        system=("", "\n\n"),
        system_in_user=True,
        default_system=None,
        user=("[INST] ", " [/INST]"),
        answer=(" ", "</s>", ""),
        pretrain=("<s>", "</s>"),
        stops=("</s>",),
        strip=True,
    ),
    # Phi-3's template has a newline after each of these tokens, which its tokenizer takes away; Phi-4's has none.
    "phi3": ChatForm(
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        bos="",
        system=("<|system|>", "<|end|>"),
        default_system=None,
        user=("<|user|>", "<|end|>"),
        answer=("<|assistant|>", "<|end|>", ""),
        pretrain=("", "<|endoftext|>"),
        stops=("<|end|>", "<|endoftext|>"),
    ),
    "llama2": ChatForm(
        tokens=("<s>", "</s>"),
        bos="<s>",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_in_user=True,
        default_system=None,
        user=("[INST] ", " [/INST]"),
        answer=(" ", " </s>", ""),
        between="<s>",
        pretrain=("<s>", "</s>"),
        stops=("</s>",),
        strip=True,
    ),
    "vicuna": _VICUNA,
    "vicuna_v1": replace(_VICUNA, default_system=_BEGINNING.format(who="user")),
    "llava_v1": replace(_VICUNA, default_system=_BEGINNING.format(who="human")),
    # Ours, for models that never had one (GPT-2, OPT): every turn ends with their end-of-text token.
    "gpt2": ChatForm(
        tokens=("{bos}", "{eos}"),
        bos="{bos}",
        system=("", "{eos}\n"),
        default_system=None,
        user=("User:\n", "{eos}\n"),
        answer=("Assistant:\n", "{eos}", "\n"),
        pretrain=("{bos}", "{eos}"),
        stops=(),
    ),
    "plain": _PLAIN,
}
