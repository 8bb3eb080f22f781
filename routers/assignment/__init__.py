"""Experts for many queries at once: the highest sum of predicted quality within one budget, capacities and loads.

    maximise    sum_ij quality_ij x_ij - sum_r load_cost_r y_r
    subject to  sum_j x_ij = 1,  sum_ij price_ij x_ij <= budget,  sum_i x_ij <= capacity_j,  x_ij <= y_r(j)

with binary x (query i goes to expert j) and y (residency r is loaded): a multiple-choice knapsack with capacities and
fixed charges. Its budget has a dual price, in quality per USD. Without capacities, each query's choice at that price is
`argmax_j quality_ij - price * price_ij`, so the dual price is the cost weight at which every query routed on its own
spends the budget.

- `problem`   the arrays, and what an assignment is worth
- `lagrange`  the dual prices by bisection, vectorised: any number of queries
- `linear`    the dual prices by the linear programme (HiGHS), up to 20,000 queries
- `moves`     single moves that repair or improve an assignment, within budget and capacities
- `exchange`  exchanges between several experts, where single moves find no room: exact as to what is feasible
- `joint`     the whole: which residencies are loaded, the assignment, its upper bound, and other budgets
"""
