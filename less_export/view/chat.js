// A chat over the server's own API, with a view of the state beside it. The key stays in the memory of the page.
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const PAUSE = 400; // milliseconds between two looks at the state
  let messages = [];
  let text = "";
  let running = null; // the AbortController of the request that runs
  let layer = null;
  let shown = null; // the id of the view that is shown
  let panel = null;

  function headers() {
    const key = at("key").value.trim();
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  }

  async function call(path, options) {
    const reply = await fetch(path, { ...options, headers: headers(), credentials: "omit" });
    if (reply.ok) return reply;
    if (reply.status === 401) at("locked").hidden = false;
    let reason = `status ${reply.status}`;
    try {
      reason = (await reply.json()).error.message;
    } catch {} // a proxy's page
    throw new Error(reason);
  }

  function say(role, content) {
    const box = document.createElement("div");
    box.className = `message ${role}`;
    box.textContent = content;
    at("log").append(box);
    at("log").scrollTop = at("log").scrollHeight;
    return box;
  }

  // The JSON of server-sent events.
  async function* events(reply) {
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }

  async function look(id) {
    const view = await (await call(`v1/views/${id}${layer === null ? "" : `?layer=${layer}`}`)).json();
    if (shown !== id) return true;
    if (view.length !== undefined) {
      if (panel === null) panel = LessView.create(at("view"), choose);
      panel.update(view);
    }
    at("status").textContent = view.final ? "at the end of the answer" : "live";
    return view.final;
  }

  async function choose(wanted) {
    layer = wanted;
    if (shown !== null) await look(shown).catch(fail);
  }

  async function follow(id) {
    shown = id;
    try {
      while (!(await look(id))) await new Promise((done) => setTimeout(done, PAUSE));
    } catch (error) {
      fail(error);
    }
  }

  function fail(error) {
    at("status").textContent = error.message;
  }

  async function send(prompt) {
    const chat = at("kind").value === "chat";
    const body = {
      stream: true,
      live_view: true,
      temperature: Number(at("temperature").value),
      max_tokens: Number(at("tokens").value),
    };
    say("user", prompt);
    const box = say("assistant", "");
    const asked = chat ? [...messages, { role: "user", content: prompt }] : text + prompt;
    Object.assign(body, chat ? { messages: asked } : { prompt: asked });
    running = new AbortController();
    let answer = "";
    try {
      const path = chat ? "v1/chat/completions" : "v1/completions";
      const reply = await call(path, { method: "POST", body: JSON.stringify(body), signal: running.signal });
      let id = null;
      for await (const event of events(reply)) {
        if (id === null) {
          id = event.id;
          follow(id);
        }
        for (const choice of event.choices) answer += (chat ? choice.delta.content : choice.text) ?? "";
        box.textContent = answer;
        at("log").scrollTop = at("log").scrollHeight;
      }
    } catch (error) {
      if (error.name !== "AbortError") say("error", error.message);
      if (answer === "") {
        box.remove();
        return;
      }
    } finally {
      running = null;
    }
    if (chat) messages = [...asked, { role: "assistant", content: answer }];
    else text = asked + answer;
  }

  function busy(now) {
    at("send").disabled = now;
    at("stop").disabled = !now;
    at("again").disabled = now;
  }

  at("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const prompt = at("prompt").value;
    if (running || prompt === "") return;
    at("prompt").value = "";
    busy(true);
    await send(prompt);
    busy(false);
    at("prompt").focus();
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    at("form").requestSubmit();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("again").addEventListener("click", () => {
    messages = [];
    text = "";
    at("log").replaceChildren();
  });
  at("kind").addEventListener("change", () => at("again").click());
  async function name() {
    at("model").textContent = (await (await call("v1/models")).json()).data[0].id;
  }
  at("key").addEventListener("change", () => name().catch(fail));
  name().catch(fail);
})();
