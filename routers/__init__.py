"""Who answers: routers score experts for a query; `decide` picks. Text in, decisions out: no engine, no Ray."""
