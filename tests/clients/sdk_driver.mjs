// Drives the JavaScript SDKs: `node sdk_driver.mjs CLIENT`.  Each line of standard input is one
// task (see `ask` in sdks.py), each line of standard output what the client showed of it.
import readline from "node:readline";

const WEATHER = {type: "object", properties: {city: {type: "string"}}, required: ["city"],
                 additionalProperties: false};
const weather = ({city}) => "wet in " + city;

// --- openai ---

async function openaiClient(task) {
  const {OpenAI} = await import("openai");
  return new OpenAI({baseURL: task.base + "/v1", apiKey: task.key, maxRetries: task.retries});
}

async function chat(task, out) {
  const client = await openaiClient(task);
  const content = task.image
    ? [{type: "text", text: task.prompt},
       {type: "image_url", image_url: {url: "data:image/png;base64," + task.image}}]
    : task.prompt;
  const body = {model: task.model, messages: [{role: "user", content}]};
  if (task.thinking) body.reasoning_effort = "high";
  if (task.tools) {
    const fn = {name: "get_weather", description: "", parameters: WEATHER,
                function: weather, parse: JSON.parse};
    const runner = client.chat.completions.runTools({
      ...body, stream: task.stream, tools: [{type: "function", function: fn}]});
    out.text = await runner.finalContent();
  } else if (task.schema) {
    const done = await client.chat.completions.parse({...body, response_format: {
      type: "json_schema", json_schema: {name: "weather", strict: true, schema: WEATHER}}});
    out.parsed = JSON.parse(done.choices[0].message.content);
  } else if (task.stream) {
    const stream = await client.chat.completions.create({
      ...body, stream: true, stream_options: {include_usage: true}});
    for await (const chunk of stream) {
      const delta = chunk.choices[0]?.delta ?? {};
      add(out, delta.content, delta.reasoning_content);
      if (task.leave && out.pieces) return stream.controller.abort();
    }
  } else {
    const message = (await client.chat.completions.create(body)).choices[0].message;
    add(out, message.content, message.reasoning_content);
  }
}

async function responses(task, out) {
  const client = await openaiClient(task);
  const content = [{type: "input_text", text: task.prompt}];
  if (task.image) {
    content.push({type: "input_image", detail: "auto",
                  image_url: "data:image/png;base64," + task.image});
  }
  const body = {model: task.model, input: [{role: "user", content}]};
  if (task.thinking) body.reasoning = {effort: "high", summary: "auto"};
  if (task.thinking && !task.store) {
    body.store = false;
    body.include = ["reasoning.encrypted_content"];
  }
  if (task.tools) {
    body.tools = [{type: "function", name: "get_weather", parameters: WEATHER, strict: true}];
  }
  if (task.schema) {
    body.text = {format: {type: "json_schema", name: "weather", strict: true, schema: WEATHER}};
    const done = await client.responses.parse(body);
    out.parsed = done.output_parsed;
    return;
  }
  for (let turn = 0; turn < 5; turn++) {
    let done;
    out.text = "";
    if (task.stream && (task.leave || task.raw)) {
      const stream = await client.responses.create({...body, stream: true});
      for await (const event of stream) {
        if (event.type === "response.output_text.delta") add(out, event.delta);
        if (event.type === "response.failed") throw new Error(event.response.error.message);
        if (event.type === "error") throw new Error(event.message);
        if (task.leave && out.pieces) return stream.controller.abort();
      }
      return;
    } else if (task.stream) {
      const stream = client.responses.stream(body);
      for await (const event of stream) {
        if (event.type === "response.output_text.delta") out.pieces++;
      }
      done = await stream.finalResponse();
    } else {
      done = await client.responses.create(body);
    }
    out.text = done.output_text;
    for (const item of done.output) {
      if (item.type === "reasoning") {
        out.thinking += (item.summary ?? []).map(part => part.text).join("");
      }
    }
    body.input.push(...done.output);
    const calls = done.output.filter(item => item.type === "function_call");
    for (const call of calls.reverse()) {
      body.input.push({type: "function_call_output", call_id: call.call_id,
                       output: weather(JSON.parse(call.arguments))});
    }
    if (!calls.length && !task.again) return;
    if (!calls.length) {
      task.again = false;
      body.input.push({role: "user", content: "and?"});
    }
  }
}

// --- @anthropic-ai/sdk ---

async function messages(task, out) {
  const {Anthropic} = await import("@anthropic-ai/sdk");
  const client = new Anthropic({baseURL: task.base, apiKey: task.key, maxRetries: task.retries});
  const content = [{type: "text", text: task.prompt}];
  if (task.image) {
    content.unshift({type: "image", source: {type: "base64", media_type: "image/png",
                                             data: task.image}});
  }
  const body = {model: task.model, max_tokens: 2000, messages: [{role: "user", content}]};
  if (task.thinking) body.thinking = {type: "enabled", budget_tokens: 1024};
  if (task.tools) {
    const tool = {type: "custom", name: "get_weather", description: "", input_schema: WEATHER,
                  run: weather, parse: input => input};
    const runner = client.beta.messages.toolRunner({...body, stream: task.stream, tools: [tool]});
    let last;
    for await (const turn of runner) last = task.stream ? await turn.finalMessage() : turn;
    return addBlocks(out, last);
  }
  if (task.schema) {
    const {jsonSchemaOutputFormat} = await import("@anthropic-ai/sdk/helpers/json-schema");
    const done = await client.messages.parse({...body, output_config: {
      format: jsonSchemaOutputFormat(WEATHER)}});
    out.parsed = done.parsed_output;
    return;
  }
  for (const again of [task.again, false]) {
    out.text = "";
    let done;
    if (task.stream) {
      const stream = client.messages.stream(body);
      for await (const event of stream) {
        if (event.type === "content_block_delta" && event.delta.text) add(out, event.delta.text);
        if (task.leave && out.pieces) return stream.abort();
      }
      out.text = "";
      done = await stream.finalMessage();
    } else {
      done = await client.messages.create(body);
    }
    addBlocks(out, done);
    if (!again) return;
    body.messages.push({role: "assistant", content: done.content},
                       {role: "user", content: "and?"});
  }
}

function addBlocks(out, message) {
  for (const block of message.content) add(out, block.text, block.thinking);
}

// --- Vercel AI SDK ---

async function aiModel(task) {
  const base = task.base + "/v1";
  if (task.api === "compatible") {
    const {createOpenAICompatible} = await import("@ai-sdk/openai-compatible");
    return createOpenAICompatible({name: "ccproxy", baseURL: base, apiKey: task.key,
                                   includeUsage: true, supportsStructuredOutputs: true,
    })(task.model);
  }
  if (task.api === "anthropic") {
    const {createAnthropic} = await import("@ai-sdk/anthropic");
    return createAnthropic({baseURL: base, apiKey: task.key})(task.model);
  }
  const {createOpenAI} = await import("@ai-sdk/openai");
  return createOpenAI({baseURL: base, apiKey: task.key})(task.model);
}

const AI_THINKING = {
  ccproxy: {reasoningEffort: "high"},
  anthropic: {thinking: {type: "enabled", budgetTokens: 1024}},
  openai: {reasoningEffort: "high", reasoningSummary: "auto", forceReasoning: true,
           store: false, include: ["reasoning.encrypted_content"]}};

async function vercel(task, out) {
  const ai = await import("ai");
  const leaving = new AbortController();
  const content = [{type: "text", text: task.prompt}];
  if (task.image) content.push({type: "image", image: Buffer.from(task.image, "base64")});
  const options = {model: await aiModel(task), maxRetries: task.retries, onError: () => {},
                   messages: [{role: "user", content}], abortSignal: leaving.signal,
                   providerOptions: {}};
  if (task.thinking) options.providerOptions = structuredClone(AI_THINKING);
  if (task.thinking && task.store) {
    delete options.providerOptions.openai.store;
    delete options.providerOptions.openai.include;
  }
  if (task.tools) {
    options.tools = {get_weather: ai.tool({description: "", execute: weather,
                                           inputSchema: ai.jsonSchema(WEATHER)})};
    options.stopWhen = (ai.isStepCount ?? ai.stepCountIs)(5);
  }
  if (task.schema) options.output = ai.Output.object({schema: ai.jsonSchema(WEATHER)});
  for (const again of [task.again, false]) {
    out.text = "";
    let done;
    if (task.stream) {
      const parts = ai.streamText(options);
      for await (const part of parts.stream ?? parts.fullStream) {
        if (part.type === "text-delta") add(out, part.text);
        if (part.type === "reasoning-delta") add(out, null, part.text);
        if (part.type === "error") throw part.error;
        if (task.leave && out.pieces) return leaving.abort();
      }
      out.text = await parts.text;
      done = {response: await parts.response};
    } else {
      done = await ai.generateText(options);
      out.text = done.text;
      out.thinking += done.reasoningText ?? "";
      out.usage = done.usage;
    }
    if (task.schema) out.parsed = done.output;
    if (!again) return;
    options.messages.push(...done.response.messages, {role: "user", content: "and?"});
  }
}

// --- the loop ---

function add(out, text, thinking) {
  if (text) out.pieces++;
  out.text += text ?? "";
  out.thinking += thinking ?? "";
}

const API = {chat, responses, messages, compatible: vercel, anthropic: vercel, openai: vercel};

for await (const line of readline.createInterface({input: process.stdin})) {
  const task = JSON.parse(line);
  const out = {text: "", thinking: "", pieces: 0};
  try {
    await API[task.api](task, out);
  } catch (error) {
    const cause = error.lastError ?? error;
    Object.assign(out, {status: cause.status ?? cause.statusCode ?? 0, error: cause.name,
                        message: String(cause.message) + " " + (cause.responseBody ?? "")
                                 + (typeof cause === "object" ? JSON.stringify(cause.error ?? "")
                                                              : cause)});
  }
  console.log(JSON.stringify(out));
}
