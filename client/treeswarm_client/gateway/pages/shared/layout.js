// Computes the positions of a tree's nodes.  Pure.

/**
 * Return a round's tree with the bonus token below the last accepted node.  The root is node 0, the draft nodes follow in
 * their order, and the bonus token is the last.  Each node has `parent`, `depth`, `row`, `kind`, `kept` and `word`.
 */
export function layOut(round) {
  const accepted = new Set(round.accepted);
  const last = round.accepted.length ? round.accepted[round.accepted.length - 1] + 1 : 0;
  const nodes = [{ parent: -1, kind: "root", kept: true, word: "" }];
  round.parents.forEach((parent, i) => {
    const kind = i < round.first ? "guess" : "late";
    nodes.push({ parent: parent + 1, kind, kept: accepted.has(i), word: round.words?.[i] ?? "" });
  });
  nodes.push({ parent: last, kind: "bonus", kept: true, word: round.bonus ?? "" });
  return { nodes, ...place(nodes) };
}

/** Assign rows: leaves one below the other, other nodes midway between their children.  Parents precede children. */
function place(nodes) {
  const children = nodes.map(() => []);
  nodes.forEach((node, i) => {
    node.depth = node.parent < 0 ? 0 : nodes[node.parent].depth + 1;
    if (node.parent >= 0) children[node.parent].push(i);
  });
  let leaves = 0;
  const stack = [[0, false]];
  while (stack.length) {
    const [i, visited] = stack.pop();
    const below = children[i];
    if (!below.length) {
      nodes[i].row = leaves++;
    } else if (visited) {
      nodes[i].row = (nodes[below[0]].row + nodes[below[below.length - 1]].row) / 2;
    } else {
      stack.push([i, true], ...below.map((child) => [child, false]).reverse());
    }
  }
  return { leaves, deepest: Math.max(...nodes.map((node) => node.depth)) };
}

/** Return a token as a label of at most `length` characters. */
export function label(word, length) {
  const text = word.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(Math.min(spaces.length, 3))).trim();
  return text.length > length ? `${text.slice(0, Math.max(1, length - 1))}…` : text;
}
