"""Where routers read a labelled conversation: where they read the same question in `generate`."""

import random

import pytest
import torch

from dpn_cli.modeling.instruction import IGNORED, cue_ends, instruction_ends, unlabelled_ends

BOS, IMAGE, WORD, CUE, ANSWER, EOS, PAD = 1, 4, 5, (6, 7), 8, 2, 0
PROMPT = [BOS, WORD, *[IMAGE] * 3, WORD, WORD, *CUE]
ROW = [*PROMPT, ANSWER, ANSWER, EOS, WORD, *CUE, ANSWER, EOS]


def cue_in(row: torch.Tensor, cue: tuple[int, ...] = CUE) -> torch.Tensor:
    return cue_ends(row == IMAGE, [row == token for token in cue])


def ends(ids: list[int], is_labelled: list[bool], cue: tuple[int, ...] = CUE) -> int:
    row = torch.tensor([ids])
    labels = torch.where(torch.tensor([is_labelled]), row, IGNORED)
    [end] = instruction_ends(labels, row == IMAGE, cue_in(row, cue), (row != PAD).long()).tolist()
    return end


@pytest.mark.parametrize("cue", [CUE, ()])
def test_labels_of_the_answers_alone_show_it(cue: tuple[int, ...]) -> None:
    is_answer = [i >= len(PROMPT) and token in (ANSWER, EOS) for i, token in enumerate(ROW)]
    assert ends(ROW, is_answer, cue) == len(PROMPT) - 1
    assert ends(ROW, [False] * (len(ROW) - 2) + [True] * 2, cue) == len(ROW) - 3  # the last answer alone
    assert ends([PAD, *ROW], [False, *is_answer], cue) == len(PROMPT)
    no_text = [BOS, WORD, IMAGE, ANSWER]  # the image ends the instruction
    assert ends(no_text, [False] * 3 + [True], ()) == 2


@pytest.mark.parametrize("hidden", [(PAD, IMAGE), (PAD,), (PAD, IMAGE, BOS)])
def test_labels_of_the_whole_row_need_the_cue(hidden: tuple[int, ...]) -> None:
    for ids in (ROW, [PAD] * 3 + ROW, ROW + [PAD] * 2):
        is_labelled = [token not in hidden for token in ids]
        first = next(i for i in range(len(ids)) if tuple(ids[i - 1 : i + 1]) == CUE)
        assert ends(ids, is_labelled) == first
        with pytest.raises(ValueError, match="set every label before the answer to -100"):
            ends(ids, is_labelled, ())


def test_rows_without_images_or_labels_end_with_their_last_token() -> None:
    text = [PAD, PAD, BOS, WORD, *CUE, ANSWER, EOS]
    assert ends(text, [token != PAD for token in text]) == len(text) - 1
    for ids in ([*PROMPT, PAD, PAD], ROW, [PAD, *ROW], ROW[:-2]):  # and with images as without labels at all
        row = torch.tensor([ids])
        [expected] = unlabelled_ends(row == IMAGE, cue_in(row), (row != PAD).long()).tolist()
        assert ends(ids, [False] * len(ids)) == expected


def test_without_labels_a_row_is_a_prompt_or_split_where_its_labels_would_split_it() -> None:
    is_answer = [i >= len(PROMPT) and token in (ANSWER, EOS) for i, token in enumerate(ROW)]
    two_turns = ROW[:-2]
    for before, after in ((0, 0), (3, 0), (0, 2)):
        for ids, expected in ((PROMPT, len(PROMPT) - 1), (two_turns, len(two_turns) - 1), (ROW, ends(ROW, is_answer))):
            row = torch.tensor([[PAD] * before + ids + [PAD] * after])
            assert unlabelled_ends(row == IMAGE, cue_in(row), (row != PAD).long()).tolist() == [expected + before]
            if not after:
                assert unlabelled_ends(row == IMAGE, cue_in(row, ()), None).tolist() == [len(ids) + before - 1], (
                    "no cue"
                )


def test_it_is_never_before_the_last_image_nor_in_the_padding() -> None:
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.choice([BOS, IMAGE, WORD, *CUE, ANSWER]) for _ in range(generator.randint(1, 20))]
        is_labelled = [generator.random() < 0.5 for _ in ids]
        padding = generator.randint(0, 3)
        try:
            end = ends([PAD] * padding + ids, [False] * padding + is_labelled)
        except ValueError:
            continue
        last_image = max((i for i, token in enumerate(ids) if token == IMAGE), default=-1)
        assert max(0, last_image) <= end - padding < len(ids)
