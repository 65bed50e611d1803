"use strict";

const form = document.querySelector("form");

form.addEventListener("submit", (event) => {
  if (event.submitter.hasAttribute("formaction")) return;
  event.preventDefault();
  follow(new FormData(form, event.submitter));
});

async function follow(data) {
  const card = document.getElementById("order").content.cloneNode(true).firstElementChild;
  document.getElementById("running").prepend(card);
  try {
    const response = await fetch(form.action, { method: "POST", body: data });
    if (!response.ok) throw new Error(`The shop answered ${response.status}.`);
    for await (const { event, data } of serverSentEvents(response.body)) SHOW[event](card, data);
    if (!card.dataset.ended) throw new Error("The connection was lost.");
  } catch (error) {
    end(card, "UNKNOWN", `${error.message} Reload the page to see where the order stands.`);
  }
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const parts = (buffer + chunk.value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const [, event, data] = /^event: (.*)\ndata: (.*)$/.exec(part);
      yield { event, data: JSON.parse(data) };
    }
  }
}

const SHOW = {
  placed(card, { order }) {
    card.querySelector("h2").textContent = order;
  },
  step(card, { step, action, outcome, why }) {
    const item = document.createElement("li");
    item.className = `${action} ${outcome.toLowerCase()}`;
    for (const text of [step, WORDS[action][outcome] ?? outcome.toLowerCase(), why ?? ""]) {
      item.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    card.querySelector("ol").append(item);
  },
  end(card, { status, why }) {
    end(card, status, why);
  },
};

const WORDS = {
  act: { DONE: "done", FAILED: "failed", UNKNOWN: "outcome unknown" },
  compensate: { DONE: "undone", FAILED: "not undone", UNKNOWN: "not known to be undone" },
};

function end(card, status, why) {
  card.dataset.ended = status;
  const mark = card.querySelector(".status");
  mark.textContent = status;
  mark.className = `status ${status.toLowerCase()}`;
  card.querySelector(".why").textContent = why;
}
