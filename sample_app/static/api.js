// What the pages share: how the API is called, and how a mistake is told.
"use strict";

const element = (id) => document.getElementById(id);
const say = (text) => { element("message").textContent = text; };

// Every error of the API is a problem document; its id finds the request in the log.
async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...options.headers };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const problem = await answer.json().catch(() => ({}));
  const reference = answer.headers.get("X-Request-ID");
  throw new Error(`${problem.detail || problem.title || answer.status} (reference ${reference})`);
}

function attempt(work) {
  return async (event) => {
    event?.preventDefault();
    say("");
    try {
      await work(event);
    } catch (error) {
      say(error.message);
    }
  };
}
