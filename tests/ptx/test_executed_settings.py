"""What passed as PTX is kept between runs, and only while its sources stay the same."""

from fastvlp_tests import executed_settings


def test_notes_of_several_processes_count_while_sources_stay(tmp_path, monkeypatch):
    notes = executed_settings.Notes(tmp_path)
    monkeypatch.setattr(executed_settings, "fingerprint", lambda op: f"{op}1")
    for pid, setting in ((10, "sm_80 a"), (11, "sm_90 a"), (10, "sm_80 b")):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        notes.add("contrastive", [setting])
    notes.add("cross_attention", ["sm_80 c"])
    assert notes.read(["contrastive"]) == {"sm_80 a", "sm_90 a", "sm_80 b"}
    changed = {"contrastive": "contrastive2", "cross_attention": "cross_attention1"}
    monkeypatch.setattr(executed_settings, "fingerprint", changed.get)
    assert notes.read(["contrastive", "cross_attention"]) == {"sm_80 c"}


def test_a_fingerprint_for_each_operator():
    operators = executed_settings.operators()
    assert "contrastive" in operators and "_core" not in operators
    assert len({executed_settings.fingerprint(op) for op in operators}) == len(operators)
