"""Graphs of the host's own nodes under a policy on a real server: each ends edited, or refused by the policy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from foreign_graphs import GRAPHS, graphs
from test_policy_server import entries, laid_out

from conceptguard.demo import lora
from conceptguard.tools.host import Host, HostError

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("base")
    laid_out(base)
    lora.write(base / "models" / "loras")
    with Host(base=base) as running:
        yield running


def ended(server: Host, prompt: dict[str, object]) -> tuple[bool, str]:
    """Whether it made a picture, and the error if not."""
    try:
        return bool(server.images(server.run(prompt))), ""
    except HostError as error:
        return False, str(error)


def test_foreign_graphs_are_edited_or_refused(server: Host, record_property: pytest.RecordProperty) -> None:
    """Every run of every graph: a picture where all of its runs were edited, else the policy's own error."""
    known, wrong, counts = server.get("/object_info"), dict[str, str](), {"edited": 0, "refused": 0}
    for name, prompt in graphs(known):
        before = len(entries(server))
        pictures, error = ended(server, prompt)
        runs = entries(server)[before:]
        said = {run["verdict"] for run in runs}
        acted = all(edit["steps"]["acted"] for run in runs for edit in run.get("edits", ()))
        if pictures and said == {"edited"} and acted and all("knife" in str(run["edits"]) for run in runs):
            counts["edited"] += 1
        elif not pictures and "refused" in said and "ConceptGuard policy: " in error:
            counts["refused"] += 1
        else:
            wrong[name] = f"{'picture' if pictures else 'none'}, {said or 'no line'}: {error[:300]}"
    print(f"{counts} of {len(GRAPHS)} graphs")
    assert not wrong, wrong
    assert len(GRAPHS) >= 50 and sum(counts.values()) == len(GRAPHS)
