"""The testbed's word-level tokenizer and LLaVA processor, built from the world's vocabulary."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from dyvte.testbed.facts import MAX_NUMBER
from dyvte.testbed.questions import NO, STEPS, YES
from dyvte.testbed.world import COLUMNS, IMAGE_SIZE, ROWS, VALUES

BOS, EOS, PAD, UNKNOWN, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
SYSTEM_PROMPT = "a chat between a curious user and a careful assistant ."
USER, ASSISTANT = "USER:", "ASSISTANT:"

# One turn as LLaVA-1.5 writes it, with the system prompt before the image.
CHAT_TEMPLATE = (
    "{{ '" + SYSTEM_PROMPT + "' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' " + USER + " ' }}{% else %}{{ ' " + ASSISTANT + " ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '" + IMAGE + " ' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ ' " + EOS + "' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' " + ASSISTANT + "' }}{% endif %}"
)

_TEMPLATES = (
    "what is plus minus ? there a how many objects are the left right of above below do and have same "
    "from go then : color shape size describe image . , at shows tour"
)


def vocabulary() -> list[str]:
    """Every word the world can say, special tokens first, in a fixed order."""
    words = [PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT]
    words += SYSTEM_PROMPT.split() + _TEMPLATES.split() + [str(n) for n in range(2 * MAX_NUMBER + 1)]
    words += [v for values in VALUES.values() for v in values] + [*ROWS, *COLUMNS, *STEPS, YES, NO]
    return list(dict.fromkeys(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer that splits at white space and puts ``<s>`` first; pads on the left, as generation needs."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(patch_size: int) -> LlavaProcessor:
    """The processor of the small testbed."""
    return llava_processor(build_tokenizer(), patch_size)


def llava_processor(tokenizer: PreTrainedTokenizerFast, patch_size: int) -> LlavaProcessor:
    """LLaVA processor around a tokenizer: images scaled to the world's canvas, values to [-1, 1]."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
