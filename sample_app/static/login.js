// Both forms are sent to the API; the answer sets a cookie that no script can read.
"use strict";

function sends(form, path) {
  element(form).addEventListener("submit", attempt(async (event) => {
    const body = JSON.stringify(Object.fromEntries(new FormData(event.target)));
    await call(path, { method: "POST", body });
    location.assign("/");
  }));
}

sends("login", "/api/session");
sends("register", "/api/users");
