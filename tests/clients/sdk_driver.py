"""Drives the Python clients from inside their own environment: `python sdk_driver.py CLIENT`.

Each line of standard input is one task (see `ask` in sdks.py), each line of standard output what
the client showed of it.  Only the packages of the client at hand are imported.
"""
from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from typing import Any, Callable, Dict, List, Optional

Task, Shown = Dict[str, Any], Dict[str, Any]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
           "additionalProperties": False, "title": "Weather", "description": "Where it is."}
TURNS = 5


def weather(city: str) -> str:
    """Weather for a city."""
    return "wet in " + city


def add(shown: Shown, text: Optional[str], thinking: Optional[str] = None) -> None:
    shown["pieces"] += bool(text)
    shown["text"] += text or ""
    shown["thinking"] += thinking or ""


def data_url(task: Task) -> str:
    return "data:image/png;base64," + task["image"]


def chat_content(task: Task) -> Any:
    if not task.get("image"):
        return task["prompt"]
    return [{"type": "text", "text": task["prompt"]},
            {"type": "image_url", "image_url": {"url": data_url(task)}}]


def messages_content(task: Task) -> List[Any]:
    content: List[Any] = [{"type": "text", "text": task["prompt"]}]
    if task.get("image"):
        content.append({"type": "image", "source": {
            "type": "base64", "media_type": "image/png", "data": task["image"]}})
    return content


def responses_content(task: Task) -> List[Any]:
    content: List[Any] = [{"type": "input_text", "text": task["prompt"]}]
    if task.get("image"):
        content.append({"type": "input_image", "detail": "auto", "image_url": data_url(task)})
    return content


CHAT_TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather.",
                                              "parameters": WEATHER}}
RESPONSES_TOOL = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
MESSAGES_TOOL = {"name": "get_weather", "description": "Weather.", "input_schema": WEATHER}


# openai.


def openai_client(task: Task) -> Any:
    import openai
    return openai.OpenAI(base_url=task["base"] + "/v1", api_key=task["key"],
                         max_retries=task["retries"])


def chat_schema() -> Any:
    return {"type": "json_schema", "json_schema": {"name": "weather", "strict": True,
                                                   "schema": WEATHER}}


def openai_chat(task: Task, shown: Shown) -> None:
    create = openai_client(task).chat.completions.create
    options: Dict[str, Any] = {"model": task["model"]}
    messages: List[Any] = [{"role": "user", "content": chat_content(task)}]
    if task.get("thinking"):
        options["reasoning_effort"] = "high"
    if task.get("tools"):
        options["tools"] = [CHAT_TOOL]
    if task.get("schema"):
        from pydantic import create_model
        answer = openai_client(task).chat.completions.parse(
            messages=messages, response_format=create_model("Weather", city=(str, ...)), **options)
        shown["parsed"] = answer.choices[0].message.parsed.model_dump()
        return
    if task["stream"] and not task.get("tools"):
        with create(messages=messages, stream=True, **options) as chunks:
            for chunk in chunks:
                delta = chunk.choices[0].delta
                add(shown, delta.content, getattr(delta, "reasoning_content", None))
                if task.get("leave") and shown["pieces"]:
                    return
        return
    for _ in range(TURNS):
        if task["stream"]:
            with openai_client(task).chat.completions.stream(messages=messages,
                                                             **options) as events:
                answer = events.get_final_completion()
        else:
            answer = create(messages=messages, **options)
        message = answer.choices[0].message
        add(shown, message.content, getattr(message, "reasoning_content", None))
        if not message.tool_calls:
            return
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": call.id,
                      "content": weather(**json.loads(call.function.arguments))}
                     for call in reversed(message.tool_calls)]


def responses_options(task: Task) -> Dict[str, Any]:
    options: Dict[str, Any] = {"model": task["model"]}
    if task.get("thinking"):
        options["reasoning"] = {"effort": "high", "summary": "auto"}
        if not task.get("store"):
            options.update(store=False, include=["reasoning.encrypted_content"])
    if task.get("tools"):
        options["tools"] = [RESPONSES_TOOL]
    return options


def openai_responses(task: Task, shown: Shown) -> None:
    client, options = openai_client(task), responses_options(task)
    given: List[Any] = [{"role": "user", "content": responses_content(task)}]
    if task.get("schema"):
        from pydantic import create_model
        answer = client.responses.parse(input=given, text_format=create_model(
            "Weather", city=(str, ...)), **options)
        shown["parsed"] = answer.output_parsed.model_dump()
        return
    for _ in range(TURNS):
        shown["text"] = ""
        answer = None
        if task["stream"]:
            with client.responses.create(input=given, stream=True, **options) as events:
                for event in events:
                    if event.type == "response.output_text.delta":
                        add(shown, event.delta)
                    elif event.type == "response.failed":
                        raise RuntimeError(event.response.error.message)
                    elif event.type in ("response.completed", "response.incomplete"):
                        answer = event.response
                    if task.get("leave") and shown["pieces"]:
                        return
        else:
            answer = client.responses.create(input=given, **options)
        shown["text"] = answer.output_text
        for item in answer.output:
            if item.type == "reasoning":
                shown["thinking"] += "".join(part.text for part in item.summary)
        given += answer.output
        calls = [item for item in answer.output if item.type == "function_call"]
        given += [{"type": "function_call_output", "call_id": call.call_id,
                   "output": weather(**json.loads(call.arguments))} for call in reversed(calls)]
        if not calls and not task.pop("again", False):
            return
        if not calls:
            given.append({"role": "user", "content": "and?"})


# anthropic.


def anthropic_messages(task: Task, shown: Shown) -> None:
    import anthropic
    client = anthropic.Anthropic(base_url=task["base"], api_key=task["key"],
                                 max_retries=task["retries"])
    messages: List[Any] = [{"role": "user", "content": messages_content(task)}]
    options: Dict[str, Any] = {"model": task["model"], "max_tokens": 2000}
    if task.get("thinking"):
        options["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    if task.get("tools") or task.get("client_tool"):
        tool: Any = anthropic_memory(task) if task.get("client_tool") else anthropic.beta_tool(
            weather, name="get_weather")
        runner = client.beta.messages.tool_runner(messages=messages, tools=[tool],
                                                  stream=task["stream"], **options)
        for turn in runner:
            last = turn.get_final_message() if task["stream"] else turn
        return add_blocks(shown, last.content)
    if task.get("schema"):
        from pydantic import create_model
        answer = client.messages.parse(messages=messages, output_format=create_model(
            "Weather", city=(str, ...)), **options)
        shown["parsed"] = answer.parsed_output.model_dump()
        return None
    while True:
        shown["text"] = ""
        if task["stream"]:
            with client.messages.stream(messages=messages, **options) as events:
                for text in events.text_stream:
                    add(shown, text)
                    if task.get("leave"):
                        return None
                answer = events.get_final_message()
            shown["text"] = ""
        else:
            answer = client.messages.create(messages=messages, **options)
        add_blocks(shown, answer.content)
        if not task.pop("again", False):
            return None
        messages += [{"role": "assistant", "content": answer.content},
                     {"role": "user", "content": "and?"}]


def anthropic_memory(task: Task) -> Any:
    """The SDK's own memory tool, which keeps its files in the working folder."""
    try:
        from anthropic.tools import BetaLocalFilesystemMemoryTool as Memory
    except ImportError:
        from anthropic.tools.memory import BetaLocalFilesystemMemoryTool as Memory
    return Memory("memory")


def add_blocks(shown: Shown, blocks: Any) -> None:
    for block in blocks:
        add(shown, getattr(block, "text", None), getattr(block, "thinking", None))


# openai-agents: its runner calls the tools and goes on until the final answer.


class Editor:
    """Applies apply_patch's operations to files of the working folder."""

    def create_file(self, operation: Any) -> str:
        from agents import apply_diff
        with open(operation.path, "w", encoding="utf-8") as file:
            file.write(apply_diff("", operation.diff, mode="create"))
        return "created " + operation.path

    def update_file(self, operation: Any) -> str:
        from agents import apply_diff
        with open(operation.path, encoding="utf-8") as file:
            text = apply_diff(file.read(), operation.diff)
        with open(operation.path, "w", encoding="utf-8") as file:
            file.write(text)
        return "updated " + operation.path

    def delete_file(self, operation: Any) -> str:
        os.remove(operation.path)
        return "deleted " + operation.path


def run_commands(request: Any) -> Any:
    from agents import ShellCallOutcome, ShellCommandOutput, ShellResult
    output = []
    for command in request.data.action.commands:
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, encoding="utf-8")
        output.append(ShellCommandOutput(stdout=done.stdout, outcome=ShellCallOutcome(
            type="exit", exit_code=done.returncode)))
    return ShellResult(output=output)


def run_locally(request: Any) -> str:
    done = subprocess.run(request.data.action.command, stdout=subprocess.PIPE, encoding="utf-8")
    return json.dumps({"stdout": done.stdout, "exit_code": done.returncode})


def make_agent(task: Task, client: Any) -> Any:
    import agents
    from pydantic import create_model
    tools = {"shell": lambda: agents.ShellTool(executor=run_commands),
             "local_shell": lambda: agents.LocalShellTool(executor=run_locally),
             "apply_patch": lambda: agents.ApplyPatchTool(editor=Editor()),
             "weather": lambda: agents.function_tool(weather, name_override="get_weather")}
    wanted = task.get("client_tool") or ("weather" if task.get("tools") else None)
    options = responses_options({**task, "tools": False})
    settings = agents.ModelSettings(
        reasoning=options.get("reasoning"), store=options.get("store"),
        response_include=options.get("include"))
    return agents.Agent(name="driver", tools=[tools[wanted]()] if wanted else [],
                        model=agents.OpenAIResponsesModel(task["model"], client),
                        model_settings=settings, output_type=create_model(
                            "Weather", city=(str, ...)) if task.get("schema") else None)


async def run_agent(task: Task, shown: Shown) -> None:
    import agents
    import openai
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=task["base"] + "/v1", api_key=task["key"],
                                max_retries=task["retries"])
    agent = make_agent(task, client)
    given: Any = [{"role": "user", "content": responses_content(task)}]
    while True:
        shown["text"] = ""
        if not task["stream"]:
            answer: Any = await agents.Runner.run(agent, given, max_turns=TURNS)
        else:
            answer = agents.Runner.run_streamed(agent, given, max_turns=TURNS)
            async for event in answer.stream_events():
                data = getattr(event, "data", None)
                if getattr(data, "type", "") == "response.output_text.delta":
                    add(shown, data.delta)
                    if task.get("leave"):
                        answer.cancel()
        if not task.get("leave"):
            shown["text"] = answer.final_output
        for item in answer.new_items:
            if item.type == "reasoning_item":
                shown["thinking"] += "".join(part.text for part in item.raw_item.summary)
        if not task.pop("again", False):
            break
        given = answer.to_input_list() + [{"role": "user", "content": "and?"}]
    if task.get("schema"):
        shown["parsed"], shown["text"] = answer.final_output.model_dump(), ""
    await client.close()


def openai_agents(task: Task, shown: Shown) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]      # agents.py is not that package
    asyncio.run(run_agent(task, shown))


# LangChain.


def langchain_model(task: Task) -> Any:
    common = {"model": task["model"], "api_key": task["key"], "max_retries": task["retries"]}
    if task["api"] == "messages":
        from langchain_anthropic import ChatAnthropic
        more = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if task.get(
            "thinking") else {}
        return ChatAnthropic(base_url=task["base"], max_tokens=2000, **more, **common)
    from langchain_openai import ChatOpenAI
    more = {"use_responses_api": task["api"] == "responses"}
    if task["api"] == "responses":
        if task.get("thinking"):
            more["reasoning"] = {"effort": "high", "summary": "auto"}
        if task.get("thinking") and not task.get("store"):
            more.update(store=False, include=["reasoning.encrypted_content"])
    elif task.get("thinking"):
        more["reasoning_effort"] = "high"
    return ChatOpenAI(base_url=task["base"] + "/v1", **more, **common)


def langchain(task: Task, shown: Shown) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    model = langchain_model(task)
    content: Any = chat_content(task)
    if task.get("schema"):
        shown["parsed"] = dict(model.with_structured_output(WEATHER).invoke(task["prompt"]))
        shown["parsed"] = {"city": shown["parsed"]["city"]}
        return
    if task.get("tools"):
        model = model.bind_tools([tool("get_weather")(weather)])
    history: List[Any] = [HumanMessage(content)]
    for _ in range(TURNS):
        shown["text"] = ""
        answer: Any = None
        if task["stream"]:
            pieces = model.stream(history)
            for piece in pieces:
                add(shown, piece.text if isinstance(piece.text, str) else piece.text())
                answer = piece if answer is None else answer + piece
                if task.get("leave") and shown["pieces"]:
                    pieces.close()
                    return
        else:
            answer = model.invoke(history)
        shown["text"] = str(answer.text)
        for block in answer.content if isinstance(answer.content, list) else []:
            if block.get("type") == "thinking":
                shown["thinking"] += block["thinking"]
            elif block.get("type") == "reasoning":
                shown["thinking"] += "".join(part["text"] for part in block.get("summary", []))
        history.append(answer)
        history += [ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
                    for call in reversed(answer.tool_calls)]
        if not answer.tool_calls and not task.pop("again", False):
            return
        if not answer.tool_calls:
            history.append(HumanMessage("and?"))


# litellm.


def litellm(task: Task, shown: Shown) -> None:
    import litellm as lite
    lite.suppress_debug_info = True
    vendor = "anthropic" if task["api"] == "messages" else "openai"
    options: Dict[str, Any] = {
        "model": "%s/%s" % (vendor, task["model"]), "api_key": task["key"],
        "api_base": task["base"] + ("" if vendor == "anthropic" else "/v1"),
        "max_retries": task["retries"], "max_tokens": 2000}
    if task["api"] == "responses":
        return litellm_responses(lite, task, shown)
    if task.get("thinking"):
        options.update(reasoning_effort="high", allowed_openai_params=["reasoning_effort"])
        if vendor == "anthropic":
            del options["reasoning_effort"], options["allowed_openai_params"]
            options["thinking"] = {"type": "enabled", "budget_tokens": 1024}
            options["allowed_openai_params"] = ["thinking"]
    if task.get("tools"):
        options["tools"] = [CHAT_TOOL]
    messages: List[Any] = [{"role": "user", "content": chat_content(task)}]
    if task.get("schema"):
        answer = lite.completion(messages=messages, response_format=chat_schema(), **options)
        shown["parsed"] = json.loads(answer.choices[0].message.content)
        return None
    for _ in range(TURNS):
        shown["text"] = ""
        if task["stream"]:
            chunks = []
            for chunk in lite.completion(messages=messages, stream=True, **options):
                chunks.append(chunk)
                add(shown, chunk.choices[0].delta.content if chunk.choices else None)
                if task.get("leave") and shown["pieces"]:
                    return None
            answer = lite.stream_chunk_builder(chunks, messages=messages)
        else:
            answer = lite.completion(messages=messages, **options)
        message = answer.choices[0].message
        shown["text"] = message.content or ""
        shown["thinking"] += getattr(message, "reasoning_content", None) or ""
        messages.append(message.model_dump(exclude_none=True))
        calls = message.tool_calls or []
        messages += [{"role": "tool", "tool_call_id": call.id,
                      "content": weather(**json.loads(call.function.arguments))}
                     for call in reversed(calls)]
        if not calls and not task.pop("again", False):
            return None
        if not calls:
            messages.append({"role": "user", "content": "and?"})


def litellm_responses(lite: Any, task: Task, shown: Shown) -> None:
    options = responses_options(task)
    options.update(model="openai/" + task["model"], api_key=task["key"],
                   api_base=task["base"] + "/v1", max_retries=task["retries"])
    given: List[Any] = [{"role": "user", "content": responses_content(task)}]
    if task.get("schema"):
        answer = lite.responses(input=given, text={"format": {
            "type": "json_schema", "name": "weather", "strict": True, "schema": WEATHER}},
            **options)
        shown["parsed"] = json.loads(answer.output_text)
        return
    for _ in range(TURNS):
        shown["text"] = ""
        answer = None
        if task["stream"]:
            for event in lite.responses(input=given, stream=True, **options):
                if event.type == "response.output_text.delta":
                    add(shown, event.delta)
                elif event.type == "response.failed":
                    raise RuntimeError(str(event.response.error))
                elif event.type == "response.completed":
                    answer = event.response
                if task.get("leave") and shown["pieces"]:
                    return
        else:
            answer = lite.responses(input=given, **options)
        items = [item if isinstance(item, dict) else item.model_dump(exclude_none=True)
                 for item in answer.output]
        shown["text"] = "".join(part["text"] for item in items if item["type"] == "message"
                                for part in item["content"])
        shown["thinking"] += "".join(part["text"] for item in items if item["type"] == "reasoning"
                                     for part in item["summary"])
        given += items
        calls = [item for item in items if item["type"] == "function_call"]
        given += [{"type": "function_call_output", "call_id": call["call_id"],
                   "output": weather(**json.loads(call["arguments"]))} for call in reversed(calls)]
        if not calls and not task.pop("again", False):
            return
        if not calls:
            given.append({"role": "user", "content": "and?"})


# llm.


def llm(task: Task, shown: Shown) -> None:
    import llm as package
    from llm.default_plugins.openai_models import Chat, Responses
    kind = Chat if task["api"] == "chat" else Responses
    model = kind("ccproxy", model_name=task["model"], api_base=task["base"] + "/v1",
                 supports_tools=True, supports_schema=True, vision=True, can_stream=True,
                 reasoning=True)
    options: Dict[str, Any] = {"key": task["key"], "stream": task["stream"]}
    if task.get("thinking"):
        options["reasoning_effort"] = "high"
    if task.get("schema"):
        options["schema"] = WEATHER
    if task.get("image"):
        options["attachments"] = [package.Attachment(
            type="image/png", content=base64.b64decode(task["image"]))]
    if task.get("tools"):
        tool = package.Tool.function(weather, name="get_weather")
        answer = model.chain(task["prompt"], tools=[tool], key=task["key"],
                             stream=task["stream"])
    else:
        answer = model.prompt(task["prompt"], **options)
    for event in answer.stream_events():
        if event.type == "text":
            add(shown, event.chunk)
        elif event.type == "reasoning":
            add(shown, None, event.chunk)
        if task.get("leave"):
            return
    if task.get("schema"):
        shown["parsed"] = json.loads(shown["text"])


ASK: Dict[str, Dict[str, Callable[[Task, Shown], None]]] = {
    "openai-py": {"chat": openai_chat, "responses": openai_responses},
    "anthropic-py": {"messages": anthropic_messages},
    "openai-agents": {"agents": openai_agents},
    "langchain": {"chat": langchain, "responses": langchain, "messages": langchain},
    "litellm": {"chat": litellm, "responses": litellm, "messages": litellm},
    "llm": {"chat": llm, "responses": llm}}


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        shown: Shown = {"text": "", "thinking": "", "pieces": 0}
        try:
            ASK[sys.argv[1]][task["api"]](task, shown)
        except Exception as error:      # whatever the client raises is what its user sees
            shown.update(status=getattr(error, "status_code", None) or 0, message=str(error),
                         error=type(error).__name__)
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
