"""Objects in notebooks: tables whose texts are escaped."""

import pytest

import counterflow as cf
from counterflow.notebook import html_table
from counterflow.posterior.summary import Summary, SummaryRow
from counterflow.training.history import Epoch, History


def test_every_text_is_escaped():
    page = html_table(("<a>", "b"), [("<script>", 1.5)], "<title>", "x & y")
    for text in ("<a>", "<script>", "<title>", "x & y"):
        assert text not in page
    assert "&lt;script&gt;" in page and "x &amp; y" in page and page.count("<tr>") == 2


def test_flows_show_sizes_and_the_cost_of_each_direction():
    flow = cf.MAF(3, layers=1, hidden=(8,))
    page = flow._repr_html_()
    assert "<td" in page and "forward substitution" in page and "one pass" in page
    mixture = cf.flows.FlowMixture([flow, cf.MAF(3, layers=1, hidden=(8,))])
    assert "member 2" in mixture._repr_html_()


def test_a_history_shows_its_first_and_last_epochs():
    epochs = [Epoch(k, -2.0 / k, -3.0 / k, k in (15, 30), 1e-3, 0.5, 100.0, 0) for k in range(1, 31)]
    page = History(epochs, "finished", 15.0)._repr_html_()
    assert "30 epochs in 15.0 s, finished; best validation -0.1000 nats, in epoch 30" in page
    assert "30 (best)" in page and "..." in page
    assert page.count("<tr>") == 22 and "<table>" in History()._repr_html_()


def test_a_summary_shows_every_element_and_the_verdict():
    row = SummaryRow(1.0, 0.1, 2.0, 0.1, -1.0, 3.0, 1234.0, 0.2)
    page = Summary({"<mu>": row, "tau[0]": row}, "The approximation is close.")._repr_html_()
    assert "&lt;mu&gt;" in page and "1,234" in page and "The approximation is close." in page


def test_a_density_shows_its_settings():
    pytest.importorskip("sklearn")
    assert "FlowDensity" in cf.FlowDensity(epochs=7)._repr_html_()
