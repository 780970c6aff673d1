// No innerHTML and no inline handlers: whatever a product is called, it is text.
"use strict";

const money = (cents, currency = "EUR") => (cents / 100).toLocaleString(undefined, { style: "currency", currency });
// Not randomUUID(): browsers have that on https and localhost only.
const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(36)).join("-");

let query = "";
let nextOffset = null;
let basket = { lines: [], total_cents: 0 };
let follower = null;
let user = null;
let rates = {};
let orderKey = null; // of an order that was sent, and of which nobody knows whether it arrived

function fromTemplate(id) {
  return element(id).content.firstElementChild.cloneNode(true);
}

async function showProducts(offset = 0) {
  const parameters = new URLSearchParams({ offset, ...(query && { q: query }) });
  const page = await call(`/api/${query ? "search" : "products"}?${parameters}`);
  const items = page.items.map((product) => {
    const item = fromTemplate("product");
    item.querySelector("h3").textContent = product.name;
    item.querySelector(".description").textContent = product.description;
    item.querySelector(".price").textContent = money(product.price_cents);
    item.querySelector(".stock").textContent = product.stock ? `${product.stock} left` : "out of stock";
    if (product.picture) {
      item.querySelector("img").src = product.picture;
      item.querySelector("img").hidden = false;
    }
    const button = item.querySelector("button");
    button.disabled = product.stock === 0;
    button.setAttribute("aria-label", `Add ${product.name}`);
    button.addEventListener("click", attempt(() => add(product.id)));
    return item;
  });
  if (offset) element("products").append(...items);
  else element("products").replaceChildren(...items);
  nextOffset = page.next_offset;
  element("more").hidden = nextOffset === null;
  if (!offset && !items.length) say("Nothing found.");
}

function showTotal() {
  element("total").textContent = money(basket.total_cents);
  const others = Object.entries(basket.total_cents ? rates : {});
  element("elsewhere").textContent = others
    .map(([currency, rate]) => `≈ ${money(basket.total_cents * rate, currency)}`).join(" ");
}

async function showBasket() {
  basket = await call("/api/basket");
  orderKey = null;
  showTotal();
  element("order").querySelector("button").disabled = !basket.lines.length;
  element("basket").replaceChildren(...basket.lines.map((line) => {
    const item = fromTemplate("line");
    item.querySelector(".name").textContent = `${line.quantity} × ${line.name}`;
    item.querySelector(".price").textContent = money(line.price_cents * line.quantity);
    item.querySelector("button").setAttribute("aria-label", `Remove ${line.name}`);
    item.querySelector("button").addEventListener("click", attempt(async () => {
      await call(`/api/basket/${line.product_id}`, { method: "DELETE" });
      await showBasket();
    }));
    return item;
  }));
  await showSuggestions();
}

// What is nice to have: if it does not come, the page says nothing.
async function showRates() {
  rates = (await call("/api/rates").catch(() => ({ rates }))).rates;
  showTotal();
}

async function showSuggestions() {
  const last = basket.lines.at(-1);
  const found = last ? await call(`/api/products/${last.product_id}/bought-together`).catch(() => []) : [];
  const missing = found.filter((product) => !basket.lines.some((line) => line.product_id === product.id));
  element("together").hidden = !missing.length;
  element("suggestions").replaceChildren(...missing.map((product) => {
    const item = fromTemplate("suggestion");
    item.querySelector(".name").textContent = product.name;
    item.querySelector("button").setAttribute("aria-label", `Add ${product.name}`);
    item.querySelector("button").addEventListener("click", attempt(() => add(product.id)));
    return item;
  }));
}

async function add(productId) {
  const line = basket.lines.find((candidate) => candidate.product_id === productId);
  const body = JSON.stringify({ quantity: (line?.quantity ?? 0) + 1 });
  await call(`/api/basket/${productId}`, { method: "PUT", body });
  await showBasket();
}

function follow(order) {
  follower?.close();
  follower = new EventSource(`/api/orders/${order.id}/events`);
  for (const status of ["placed", "confirmed", "shipped"]) {
    follower.addEventListener(status, () => {
      element("order-status").textContent = `Your order of ${money(order.total_cents)} is ${status}.`;
      // Without this the browser would ask again and again for news of a finished order.
      if (status === "shipped") follower.close();
    });
  }
}

async function showAccount() {
  user = await call("/api/session");
  element("sign-in").hidden = user !== null;
  element("sign-out").hidden = user === null;
  element("who").textContent = user?.name ?? "";
  if (user) followOrders();
}

// The browser sends the session's cookie with the handshake; the shop refuses it if another site asks.
function followOrders() {
  const items = new Map();
  const news = new WebSocket(new URL("/api/orders/live", location.href.replace(/^http/, "ws")));
  news.addEventListener("open", () => element("order-events").replaceChildren());
  // Going away, or starting again: the shop asks anew who it is. Anything else is an end.
  news.addEventListener("close", (event) => {
    if (event.code === 1001 || event.code === 1012) setTimeout(followOrders, 2000);
  });
  news.addEventListener("message", (message) => {
    const event = JSON.parse(message.data);
    const item = items.get(event.order_id) ?? fromTemplate("order-event");
    items.set(event.order_id, item);
    item.querySelector(".name").textContent = `Order ${event.order_id.slice(0, 8)}`;
    item.querySelector(".status").textContent = event.status;
    element("order-events").prepend(item);
    element("news").hidden = false;
  });
}

element("sign-out").addEventListener("click", attempt(async () => {
  await call("/api/session", { method: "DELETE" });
  location.reload();
}));
element("search").addEventListener("submit", attempt(async (event) => {
  query = new FormData(event.target).get("q").trim();
  await showProducts();
}));
element("more").addEventListener("click", attempt(() => showProducts(nextOffset)));
element("order").addEventListener("submit", attempt(async (event) => {
  const body = JSON.stringify(Object.fromEntries(new FormData(event.target)));
  // Without an answer the key is kept: the second click asks what became of the first, and orders nothing twice.
  const headers = { "Idempotency-Key": orderKey ??= newKey() };
  const order = await call("/api/orders", { method: "POST", body, headers }).catch((error) => {
    if (!(error instanceof TypeError)) orderKey = null;
    throw error;
  });
  event.target.reset();
  if (!user) follow(order); // who is signed in is told of all orders anyway
  await Promise.all([showBasket(), showProducts()]);
}));

element("order").addEventListener("input", () => { orderKey = null; });

attempt(() => Promise.all([showProducts(), showBasket(), showAccount(), showRates()]))();
