// What OpenAI's client for Node is asked to do, as client_calls.py does it in Python: node client_calls.mjs ADDRESS BUSY
import OpenAI from "openai";
import { readFileSync } from "node:fs";

const [address, busy] = process.argv.slice(2);
const messages = [{ role: "user", content: "Tell me about hawks." }];
const law = { model: "eyas", messages, max_tokens: 40, seed: 1 };
const parameters = { type: "object", properties: { city: { enum: ["Ghent", "Lyon"] } }, required: ["city"], additionalProperties: false };
const schema = { type: "object", properties: { bird: { enum: ["hawk", "owl"] } }, required: ["bird"], additionalProperties: false };
const made = (at, maxRetries) => new OpenAI({ baseURL: `${at}/v1`, apiKey: "none", maxRetries, timeout: 120_000 });
const client = made(address, 0);
const patient = made(busy, 8);

async function said(claim, check) {
  let wrong;
  try {
    wrong = await check();
  } catch (error) {
    wrong = `${error.constructor.name}: ${error.message}`;
  }
  console.log(wrong ? `FAILED ${claim}: ${wrong}` : `ok ${claim}`);
}

async function text(stream) {
  let found = "";
  for await (const chunk of stream) found += chunk.choices[0].delta.content ?? "";
  return found;
}

async function tooMany() {
  const lines = (await (await fetch(`${busy}/metrics`)).text()).split("\n");
  const found = lines.filter((line) => line.includes("request_failure_total{") && line.includes('code="429"'));
  return found.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

const version = JSON.parse(readFileSync("node_modules/openai/package.json")).version;
console.log(`version ${version}`);
const whole = (await client.chat.completions.create(law)).choices[0].message.content;
await said("a whole answer", () => (whole ? null : "it is empty"));
await said("the same in a stream", async () => ((await text(await client.chat.completions.create({ ...law, stream: true }))) === whole ? null : "another text"));
await said("the same by the helper", async () => ((await client.chat.completions.stream(law).finalContent()) === whole ? null : "another text"));
await said("a forced tool", async () => {
  const tools = [{ type: "function", function: { name: "weather", parameters } }];
  const found = await client.chat.completions.create({ ...law, tools, tool_choice: "required" });
  const { city } = JSON.parse(found.choices[0].message.tool_calls[0].function.arguments);
  return ["Ghent", "Lyon"].includes(city) ? null : city;
});
await said("an answer of a form", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "sighting", strict: true, schema } };
  const found = await client.chat.completions.parse({ ...law, response_format });
  return ["hawk", "owl"].includes(found.choices[0].message.parsed.bird) ? null : "another bird";
});
await said("a 400 in our words", async () => {
  try {
    await client.chat.completions.create({ ...law, temperature: 7 });
  } catch (error) {
    return error instanceof OpenAI.BadRequestError && error.message.includes("temperature must be") ? null : error.message;
  }
  return "nothing was raised";
});
await said("a stream that is left frees its slot", async () => {
  const stream = await patient.chat.completions.create({ ...law, max_tokens: 2000, stream: true });
  for await (const _ of stream) break;
  return (await patient.chat.completions.create(law)).choices[0].message.content ? null : "no answer";
});
await said("a 429 is tried again", async () => {
  const before = await tooMany();
  const held = await made(busy, 8).chat.completions.create({ ...law, max_tokens: 4000, stream: true, ignore_eos: true });
  const answer = patient.chat.completions.create(law);
  for (let turn = 0; turn < 600 && (await tooMany()) === before; turn++) await new Promise((done) => setTimeout(done, 100));
  held.controller.abort();
  const found = (await answer).choices[0].message.content;
  return found && (await tooMany()) > before ? null : "not refused, or no answer";
});
