"""The sentence on groups that cannot be pruned; the other notes are tested with the selector."""

from prunekit.pruning.plan import Group
from prunekit.pruning.selection.explain import describe_unprunable


def test_describe_unprunable_counts_reasons():
    groups = [Group(id=str(k), channels=1, members=[], reason=reason) for k, reason in enumerate("aabcd")]
    assert describe_unprunable(groups) == "5 groups cannot be pruned: 2 a; 1 b; 1 c; 1 other"
    assert describe_unprunable([Group(id="free", channels=1, members=[])]) is None
