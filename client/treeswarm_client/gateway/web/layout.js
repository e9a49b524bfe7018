// Where the nodes of a tree go.  Pure.

/**
 * A round's tree with the target's own token hung below the last accepted node.  The root is node 0, the drafted nodes
 * follow in their order, the target's own is the last.  Each has `parent`, `depth`, `row`, and what it is.
 */
export function grown(round) {
  const accepted = new Set(round.accepted);
  const last = round.accepted.length ? round.accepted[round.accepted.length - 1] + 1 : 0;
  const nodes = [{ parent: -1, kind: "root", kept: true, word: "" }];
  round.parents.forEach((parent, i) => {
    const kind = i < round.first ? "guess" : "late";
    nodes.push({ parent: parent + 1, kind, kept: accepted.has(i), word: round.words?.[i] ?? "" });
  });
  nodes.push({ parent: last, kind: "bonus", kept: true, word: round.bonus ?? "" });
  return { nodes, ...placed(nodes) };
}

/** Rows: leaves one below the other, the others in the middle of their children.  Parents stand before children. */
function placed(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, i) => {
    node.depth = node.parent < 0 ? 0 : nodes[node.parent].depth + 1;
    if (node.parent >= 0) children[node.parent].push(i);
  });
  let leaves = 0;
  const left = [[0, false]];
  while (left.length) {
    const [i, seen] = left.pop();
    const below = children[i];
    if (!below.length) {
      nodes[i].row = leaves++;
    } else if (seen) {
      nodes[i].row = (nodes[below[0]].row + nodes[below[below.length - 1]].row) / 2;
    } else {
      left.push([i, true], ...below.map((child) => [child, false]).reverse());
    }
  }
  return { leaves, deepest: Math.max(...nodes.map((node) => node.depth)) };
}

/** What a token looks like in a label of so many letters. */
export function label(word, letters) {
  const shown = word.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(Math.min(spaces.length, 3))).trim();
  return shown.length > letters ? `${shown.slice(0, Math.max(1, letters - 1))}…` : shown;
}
