"""Print the test vectors of the noise contract: `python proto/make_noise_vectors.py > proto/noise_vectors.json`."""

import json

from treeswarm.session.noise import gumbel_row, noise_bits

CASES = [
    (seed, sample, position, token)
    for seed in (0, 1, 2**64 - 1)
    for sample, position in ((0, 0), (0, 1), (3, 70_000))
    for token in (0, 1, 2, 3, 4, 127_999)
]


def main() -> None:
    vectors = [
        {
            "seed": str(seed),
            "sample": sample,
            "position": position,
            "token": token,
            "u64": str(noise_bits(seed, sample, position, token + 1)[token]),
            "gumbel": float(gumbel_row(seed, sample, position, token + 1)[token]),
        }
        for seed, sample, position, token in CASES
    ]
    print(json.dumps({"contract": "Philox4x64-10, see swarm/treeswarm/session/noise.py", "vectors": vectors}, indent=1))


if __name__ == "__main__":
    main()
