import torch

from dpn_cli.conversion.vocabulary import SPREAD, Vocabulary, draw_rows


def test_drawn_rows_have_the_mean_and_covariance_of_the_others() -> None:
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) @ mixing + 0.5
    rows = draw_rows(embedding, 20_000, seed=0)
    centred = embedding.double() - embedding.double().mean(0)
    covariance = SPREAD * centred.T @ centred / len(embedding)
    deviation = (SPREAD * centred.var(0)).sqrt()
    torch.testing.assert_close(rows.mean(0), embedding.double().mean(0), rtol=0, atol=float(deviation.max()) * 0.03)
    scale = deviation[:, None] * deviation
    assert ((rows.T.cov() - covariance) / scale).abs().max() < 0.04


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    embedding = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(draw_rows(embedding, 3, 1), draw_rows(embedding, 3, 1))
    assert not torch.equal(draw_rows(embedding, 3, 1), draw_rows(embedding, 3, 2))


def test_rows_are_kept_moved_and_drawn() -> None:
    old = torch.arange(10.0)[:, None].expand(10, 4).contiguous()
    grown = Vocabulary(size=64, kept=9, moved={11: 9}).resized(lambda: old, lambda: old, seed=0)
    assert grown.shape == (64, 4)
    assert torch.equal(grown[:9], old[:9]) and torch.equal(grown[11], old[9])
    assert (grown[12:] - old[:9].mean(0)).abs().max() < 0.1
    assert torch.equal(Vocabulary(size=10, kept=10, moved={}).resized(lambda: old, lambda: old, 0), old)
