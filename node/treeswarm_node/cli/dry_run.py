"""`swarm-node MODEL --dry-run`: say what a node would do with a model, and load nothing."""

import json

from treeswarm.programs.process import printable
from treeswarm.progress import Progress
from treeswarm_node.config import NodeConfig
from treeswarm_node.dry_run.appraisal import appraise
from treeswarm_node.dry_run.report import as_dict, as_text
from treeswarm_node.model.automatic import this_machine


def dry_run(config: NodeConfig, *, as_json: bool = False, progress: Progress | None = None) -> int:
    """Print what a node with `config` would do with its model; the exit status is 1 if it would not serve it.

    Raises ModelError if there is no such model.
    """
    appraisal = appraise(config, this_machine(), progress)
    print(json.dumps(as_dict(appraisal)) if as_json else printable(as_text(appraisal)))
    return 0 if appraisal.can_start else 1
