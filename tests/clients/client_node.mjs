// The node client (npm package `openai`): the same questions as client_openai.py, with one JSON line a feature.
//   node tests/clients/client_node.mjs --url http://127.0.0.1:8000/v1 --expert scripted
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

const { values } = parseArgs({ options: { url: { type: "string" }, expert: { type: "string", default: "scripted" },
  modules: { type: "string", default: process.cwd() }, only: { type: "string", multiple: true } } });
const require = createRequire(pathToFileURL(`${values.modules}/`));
const { default: OpenAI, BadRequestError, NotFoundError } = await import(pathToFileURL(require.resolve("openai")).href);

const { zodResponseFormat } = await import(pathToFileURL(require.resolve("openai/helpers/zod")).href);
const { z } = await import(pathToFileURL(require.resolve("zod")).href);

const CAPITAL = "What is the capital of France?", WEATHER = "What is the weather in Paris?";
const TWO_CITIES = "What is the weather in Paris and in Rome?", REPORT = "18 degrees and sunny";
const PERSON = "Ada Lovelace is 36 years old. Extract the person as JSON.";
const PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const tool = { type: "function", function: { name: "get_weather", description: "The weather of a city.", parameters: city } };
const OBJECT = 'Ada Lovelace is 36 years old. Extract the person as JSON: {"name": "...", "age": ...}';
const person = z.object({ name: z.string(), age: z.number().int() });

const client = new OpenAI({ baseURL: values.url, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const scripted = values.expert === "scripted";
const user = (content) => [{ role: "user", content }];
const create = (messages, more = {}) =>
  client.chat.completions.create({ model: values.expert, max_tokens: 80, messages, ...more });
const calls = (answer) => answer.choices[0].message.tool_calls.map((c) => [c.function.name, JSON.parse(c.function.arguments)]);

const features = {
  async chat() {
    const answer = await create([{ role: "developer", content: "Be brief." }, ...user(CAPITAL)]);
    assert.equal(answer.choices[0].message.content, "The capital of France is Paris.");
    assert.ok(answer.usage.completion_tokens > 0);
  },
  async stream() {
    const pieces = [];
    const runner = client.chat.completions.stream({ model: values.expert, max_tokens: 20, messages: user(CAPITAL),
      stream_options: { include_usage: true } });
    runner.on("content", (piece) => pieces.push(piece));
    assert.equal(await runner.finalContent(), "The capital of France is Paris.");
    assert.ok(pieces.length > 1 && (await runner.totalUsage()).completion_tokens > 0);
  },
  async history() {
    const first = await create(user(CAPITAL));
    const answer = await create([...user(CAPITAL), first.choices[0].message, ...user(CAPITAL)]);
    assert.match(answer.choices[0].message.content, /Paris/);
  },
  async tools() {
    const answer = await create(user(WEATHER), { tools: [tool], tool_choice: "required" });
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(calls(answer)[0][0], "get_weather");
    if (scripted) assert.deepEqual(calls(answer), [["get_weather", { city: "Paris" }]]);
  },
  async "tools, named"() {
    const answer = await create(user(CAPITAL), { tools: [tool], tool_choice: { type: "function", function: { name: "get_weather" } } });
    assert.equal(calls(answer)[0][0], "get_weather");
  },
  async "tools, parallel"() {
    const several = await create(user(TWO_CITIES), { tools: [tool] });
    assert.deepEqual(calls(several).map(([, given]) => given.city), ["Paris", "Rome"]);
    assert.equal(calls(await create(user(TWO_CITIES), { tools: [tool], parallel_tool_calls: false })).length, 1);
  },
  async "tools, streamed"() {
    const runner = client.chat.completions.stream({ model: values.expert, messages: user(WEATHER), tools: [tool] });
    const pieces = [];
    runner.on("tool_calls.function.arguments.delta", (event) => pieces.push(event.arguments_delta));
    const call = await runner.finalFunctionToolCall();
    assert.deepEqual([call.name, JSON.parse(call.arguments)], ["get_weather", { city: "Paris" }]);
    assert.equal(pieces.join(""), call.arguments);
  },
  async "tools, results"() {
    const { message } = (await create(user(WEATHER), { tools: [tool] })).choices[0];
    const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: REPORT }));
    const last = await create([...user(WEATHER), message, ...results], { tools: [tool] });
    assert.match(last.choices[0].message.content, new RegExp(REPORT));
  },
  async agent() {
    const run = async ({ city }) => `${city}: ${REPORT}`;
    const runner = client.chat.completions.runTools({ model: values.expert, messages: user(WEATHER),
      tools: [{ ...tool, function: { ...tool.function, function: run, parse: JSON.parse } }] });
    assert.match(await runner.finalContent(), new RegExp(`Paris: ${REPORT}`));
  },
  async "agent, streamed"() {
    const run = async ({ city }) => `${city}: ${REPORT}`;
    const pieces = [];
    const runner = client.chat.completions.runTools({ model: values.expert, messages: user(WEATHER), stream: true,
      tools: [{ ...tool, function: { ...tool.function, function: run, parse: JSON.parse } }] });
    runner.on("content", (piece) => pieces.push(piece));
    assert.match(await runner.finalContent(), new RegExp(`Paris: ${REPORT}`));
    assert.ok(pieces.length > 1);
  },
  async "JSON schema"() {
    const answer = await client.chat.completions.parse({ model: values.expert, max_tokens: 60, messages: user(PERSON),
      response_format: zodResponseFormat(person, "person") });
    const { parsed } = answer.choices[0].message;
    assert.deepEqual(Object.keys(parsed).sort(), ["age", "name"]);
    if (scripted) assert.deepEqual(parsed, { name: "Ada Lovelace", age: 36 });
  },
  async "JSON schema, streamed"() {
    const runner = client.chat.completions.stream({ model: values.expert, max_tokens: 60, messages: user(PERSON),
      response_format: zodResponseFormat(person, "person") });
    const { parsed } = (await runner.finalChatCompletion()).choices[0].message;
    assert.deepEqual(Object.keys(parsed).sort(), ["age", "name"]);
  },
  async "JSON object"() {
    const answer = await create(user(OBJECT), { response_format: { type: "json_object" } });
    assert.equal(typeof JSON.parse(answer.choices[0].message.content), "object");
  },
  async logprobs() {
    const { message, logprobs } = (await create(user(CAPITAL), { logprobs: true, top_logprobs: 2 })).choices[0];
    assert.ok(logprobs.content.map((score) => score.token).join("").startsWith(message.content));
    assert.ok(logprobs.content.every((score) => score.logprob <= 0 && score.top_logprobs.length === 2));
  },
  async "n > 1"() {
    const answer = await create(user(CAPITAL), { n: 3, temperature: 0.7, seed: 1, max_tokens: 20 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  },
  async images() {
    const answer = await create(user([{ type: "text", text: "What is this?" }, { type: "image_url", image_url: { url: PIXEL } }]));
    assert.equal(answer.choices[0].message.content, "The number of images is 1.");
  },
  async reasoning() {
    const { message } = (await create(user(CAPITAL), { reasoning_effort: "low" })).choices[0];
    assert.match(message.content, /Paris/);
    if (scripted) assert.equal(message.reasoning_content, "The user asks a question.");
  },
  async completions() {
    const answer = await client.completions.create({ model: values.expert, prompt: "The capital of France is", max_tokens: 8 });
    assert.match(answer.choices[0].text, /Paris/);
  },
  async "several prompts"() {
    const prompt = ["The capital of France is", "I count to four: one, two,"];
    const answer = await client.completions.create({ model: values.expert, prompt, max_tokens: 8 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  },
  async "echo with logprobs"() {
    const prompt = "The capital of France is";
    const answer = await client.completions.create({ model: values.expert, prompt, max_tokens: 1, echo: true, logprobs: 1 });
    const [{ text, logprobs }] = answer.choices;
    assert.ok(text.startsWith(prompt) && logprobs.tokens.join("").startsWith(prompt));
    assert.equal(logprobs.tokens.length, logprobs.token_logprobs.length);
  },
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert.ok(names.includes(values.expert));
  },
  async "error: context"() {
    await assert.rejects(create(user("word ".repeat(20_000))), (error) =>
      error instanceof BadRequestError && error.code === "context_length_exceeded");
  },
  async "error: model"() {
    await assert.rejects(create(user(CAPITAL), { model: "nothing-like-it" }), (error) =>
      error instanceof NotFoundError && error.code === "model_not_found");
  },
};

const needScript = ["tools, parallel", "tools, streamed", "tools, results", "agent", "agent, streamed"];
const { version } = JSON.parse(readFileSync(`${values.modules}/node_modules/openai/package.json`, "utf8"));
console.log(JSON.stringify({ client: "openai (node)", version }));
for (const [feature, run] of Object.entries(features)) {
  if (values.only ? !values.only.includes(feature) : !scripted && needScript.includes(feature)) continue;
  const started = performance.now();
  let outcome = "works", detail = "";
  try {
    await run();
  } catch (error) {
    const refused = error.status >= 400 && error.status < 500;
    [outcome, detail] = refused ? ["refused", error.error?.message ?? error.message] : ["fails", String(error.stack)];
  }
  console.log(JSON.stringify({ feature, outcome, detail, seconds: Math.round(performance.now() - started) / 1000 }));
}
