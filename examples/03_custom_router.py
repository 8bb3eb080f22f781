"""A router of your own, named by `module:Class`. docs/plugins.md: what each method must do, and how a package adds one.

python examples/03_custom_router.py                        # writes the router to the folder my-router
"""

import numpy as np

from routers import Estimate, OutcomeTable, Query, RouterState, build, decide, load, save


class Digits:
    """An expert is as good on a query with a digit as on those in training, and so for queries without one."""

    kind, requires, experts, means = "digits", frozenset(), (), np.zeros((2, 0))

    def fit(self, table):
        with_digit = np.array([any(map(str.isdigit, prompt)) for prompt in table.prompts])
        self.experts = table.experts
        self.means = np.stack([table.scores[with_digit == digit].mean(axis=0) for digit in (False, True)])
        return self

    def estimate(self, queries):
        return Estimate(self.experts, self.means[[int(any(map(str.isdigit, query.text))) for query in queries]])

    def state(self):
        return RouterState({"means": self.means}, {"experts": list(self.experts)})

    @classmethod
    def from_state(cls, state, encoder):
        router = cls()
        router.experts, router.means = tuple(state.settings["experts"]), state.arrays["means"]
        return router


if __name__ == "__main__":
    table = OutcomeTable(("a", "b"), ("Capital of Peru?", "2 + 3?"), ("capitals", "sums"), np.eye(2))
    save(build(f"{__name__}:Digits").fit(table), "my-router", table=table, encoder=None)
    router = load("my-router", plugins=[__name__]).router  # a saved router imports only the modules that you allow
    print(decide(router.estimate([Query.of("How much is 7 + 8?")]))[0].experts[0])
