"""Open-AutoGLM's agent as a server meets it: its requests word for word, and how it reads the answers, restated.

Source: zai-org/Open-AutoGLM at 6b18d7b (February 2026), phone_agent/agent.py, model/client.py and actions/handler.py.
Newer branches of it look for the <answer> tag before they look for the action; `thought_and_action` knows both orders.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from typing import Any

import openai

MODEL = "autoglm-phone-9b"
SAMPLING = {"max_tokens": 3000, "temperature": 0.0, "top_p": 0.85, "frequency_penalty": 0.2}
STARTS = ("finish(message=", "do(action=")
# What its handler can carry out; anything else fails a step.
ACTIONS = frozenset(
    ("Launch", "Tap", "Type", "Type_Name", "Swipe", "Back", "Home", "Double Tap", "Long Press", "Wait")
    + ("Take_over", "Note", "Call_API", "Interact")
)


def thought_and_action(content: str, *, tags_first: bool = False) -> tuple[str, str]:
    """The two parts it takes an answer for: the action is all from its start to the end of the answer."""
    for start in ("<answer>",) * tags_first + STARTS + ("<answer>",):
        if start not in content:
            continue
        thought, _, rest = content.partition(start)
        if start != "<answer>":
            return thought.strip(), start + rest
        for tag in ("<think>", "</think>"):
            thought = thought.replace(tag, "")
        return thought.strip(), rest.replace("</answer>", "").strip()
    return "", content


def read_action(action: str) -> dict[str, Any]:
    """The action its handler gets. Raises ValueError where it gives up, shows the text as the result and ends the task.

    Texts are cut out by position, so whatever follows the closing bracket is typed or shown.
    """
    action = action.strip()
    if action.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        return {"action": "Type", "text": action.partition("text=")[2][1:-2]}
    if action.startswith("finish"):
        return {"finish": action.replace(STARTS[0], "")[1:-2]}
    if not action.startswith("do"):
        raise ValueError(f"no action: {action}")
    for char, escape in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        action = action.replace(char, escape)
    try:
        call = ast.parse(action, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"no Python: {action}") from error
    if not isinstance(call, ast.Call):
        raise ValueError(f"no call: {action}")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


@dataclass
class Agent:
    """One task: a system prompt, then a screenshot a step; only the newest one stays in the history.

    timings   of the newest answer, out of its last chunk
    """

    client: openai.OpenAI
    system_prompt: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)

    def step(self, task: str, app: str, png_base64: str) -> str:
        """Send one screenshot; the whole content that came back."""
        screen = json.dumps({"current_app": app}, ensure_ascii=False)
        words = f"** Screen Info **\n\n{screen}"
        if not self.messages:
            self.messages.append({"role": "system", "content": self.system_prompt})
            words = f"{task}\n\n{screen}"
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png_base64}"}}
        text = {"type": "text", "text": words}
        self.messages.append({"role": "user", "content": [picture, text]})
        content = ""
        for chunk in self.client.chat.completions.create(
            messages=self.messages,  # type: ignore[arg-type]
            model=MODEL,
            extra_body={},
            stream=True,
            **SAMPLING,  # type: ignore[arg-type]
        ):
            if chunk.choices:
                content += chunk.choices[0].delta.content or ""
            self.timings = getattr(chunk, "timings", None) or self.timings
        self.messages[-1] = {"role": "user", "content": [text]}
        thought, action = thought_and_action(content)
        self.messages.append({"role": "assistant", "content": f"<think>{thought}</think><answer>{action}</answer>"})
        return content
