"""Stands in for the service that knows the exchange rates. Nobody starts it but you:

uvicorn sample_app.rates_server:app --port 8100
SHOP_RATES_URL=http://127.0.0.1:8100 uvicorn sample_app.main:app
"""

from fastapi import FastAPI

from fastapi_hardening import harden

app = FastAPI(title="Exchange rates")
# So the id of the shopper's request is in the log of this service, too.
harden(app)


@app.get("/latest")
async def latest() -> dict[str, dict[str, float]]:
    """Tell what one euro is worth."""
    return {"rates": {"CHF": 0.93, "GBP": 0.87, "USD": 1.16}}
